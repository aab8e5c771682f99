"""The checkpoints that a chronological run keeps at the borders of its periods."""

from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from nested_lm.checkpoint import list_checkpoints, verify_checkpoint
from nested_lm.errors import CheckpointError
from nested_lm_lab.evaluation.identity import mark_checkpoint
from nested_lm_lab.evaluation.schema import CheckpointMark

CHECKPOINTS = "checkpoints"


def border_checkpoints(run_dir: Path, periods: int, *, report: Callable[[str], None]) -> list[Path]:
    """Checkpoints `period-0` to `period-S` of a chronological run, in order.

    Raises:
        CheckpointError: the run has not reached all of them, or one was lost.
    """
    found = {}
    for path in list_checkpoints(run_dir / CHECKPOINTS):
        try:
            found[verify_checkpoint(path)["milestone"]] = path
        except CheckpointError as error:
            report(f"skipped damaged checkpoint: {error}")
    names = [f"period-{period}" for period in range(periods + 1)]
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"{run_dir}: border checkpoints {', '.join(missing)} are missing or damaged; "
            "forgetting needs all of them. Finish the run with `nested-lm train ... --resume auto`, or train "
            "it anew"
        )
    return [found[name] for name in names]


def mark_borders(borders: Sequence[Path]) -> CheckpointMark:
    """Names of the first and the last border, and a digest of all of them."""
    joined = xxhash.xxh3_128_hexdigest("".join(mark_checkpoint(path).digest for path in borders).encode())
    return CheckpointMark(name=f"{borders[0].name} to {borders[-1].name}", digest=joined)
