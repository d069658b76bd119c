"""What `adapter.benchmark.main` measures: ranks.py, parts.py and limits.py inside a job; driver.py jobs and peers in
turn, peers/ what those run."""
