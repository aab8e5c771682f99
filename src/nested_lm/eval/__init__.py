"""Measurements on a checkpoint."""
