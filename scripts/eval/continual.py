"""Continual learning of runs or checkpoints: `python scripts/eval/continual.py RUN_OR_CHECKPOINT... [options]`.

The same as `nested-lm eval continual`.
"""

import sys

from nested_lm.cli.main import app

app(["eval", "continual", *sys.argv[1:]])
