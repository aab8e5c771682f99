"""Continual learning: what a model keeps of what it has learned, and what its clocks have to do with it."""
