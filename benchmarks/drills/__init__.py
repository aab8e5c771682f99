"""Fault drills: what a crash, a bad disk, a second writer does. `python -m benchmarks.drills NAME|all [--trials N]`."""
