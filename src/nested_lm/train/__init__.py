"""Trains a run: one loop, checkpoints that continue bit for bit, metrics, clean stops."""
