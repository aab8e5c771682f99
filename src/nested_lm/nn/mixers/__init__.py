"""Mixers: the part of a block that moves information between tokens."""
