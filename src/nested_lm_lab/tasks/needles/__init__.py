"""Needle curves: prompts of exact length, read with shared prefixes, scored with controls."""
