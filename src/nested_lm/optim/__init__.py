"""Optimizers and which parameter gets which."""
