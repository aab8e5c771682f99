"""Checks that a model is what the papers' equations say, with figures against limits: `nested-lm audit`."""
