"""`python -m benchmarks.learning` is `python benchmarks/learning/run.py`."""

from benchmarks.learning.run import main

main()
