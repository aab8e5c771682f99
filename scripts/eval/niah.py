"""Needle curves of a run or checkpoint: `python scripts/eval/niah.py RUN_OR_CHECKPOINT [options]`.

The same as `nested-lm eval niah`.
"""

import sys

from nested_lm.cli.main import app

app(["eval", "niah", *sys.argv[1:]])
