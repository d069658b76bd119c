"""`adapter.doctor`: what an issue report needs, and what is wrong on this machine (main.py is the command)."""
