"""Processes that hold what is timed, one for each virtual environment. They need torch and the standard library."""
