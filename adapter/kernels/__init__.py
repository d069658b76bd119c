"""The arithmetic below the layers: C++ operators, their build, and torch's where they do not fit."""
