"""Measurements: speed, exactness, memory, and what models learn."""
