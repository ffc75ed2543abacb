"""What kvant does on a GPU: right or wrong, how fast, in how much memory. `run_all.py` runs it."""
