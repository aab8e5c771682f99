"""Zero-shot tasks on a run or checkpoint: `python scripts/eval/zeroshot.py RUN_OR_CHECKPOINT --tasks all [options]`.

The same as `nested-lm eval zeroshot`.
"""

import sys

from nested_lm.cli.main import app

app(["eval", "zeroshot", *sys.argv[1:]])
