"""Memories in C for processors."""
