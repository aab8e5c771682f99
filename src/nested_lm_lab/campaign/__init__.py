"""Graphs of runs, evaluations and reports."""
