"""Modules; single-device code."""
