"""nested-lm: Hope language models, whose fast weights go on learning while they read."""

__version__ = "0.1.0.dev0"
