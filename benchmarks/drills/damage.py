"""Drills of stored files: one flipped bit, a file cut short, nonsense in its place; what reads it must notice."""

import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.drills.drill import Outcome, fork, wait
from benchmarks.drills.runs import make_data, make_run, run_once
from nested_lm.checkpoint import list_checkpoints, verify_checkpoint
from nested_lm.errors import NestedLMError
from nested_lm.train.metrics import read_records
from nested_lm.train.run_folder import CHECKPOINTS, IDENTITY, METRICS, RESOLVED, read_run_identity
from nested_lm_lab.campaign.ledger import Attempt, Ledger
from nested_lm_lab.report.manifest import CampaignManifest, read_manifest, write_manifest

_NONSENSE = (b"", b"{", b"[]", b"null", b"\xff\xfe\0", b"[" * 50_000, b'{"a": {"b": [1, 2', b"\0" * 64)


def _stored_files(folder: Path) -> dict[Path, Callable[[], object]]:
    """Every file that a run, its checkpoints and a campaign write, with what reads it."""
    config = make_run(folder / "run", make_data(folder / "data"))
    assert wait(fork(lambda: run_once(config))) == 0
    run, campaign = Path(config.output_dir), folder / "campaign"
    newest = list_checkpoints(run / CHECKPOINTS)[-1]
    found: dict[Path, Callable[[], object]] = {path: lambda: verify_checkpoint(newest) for path in newest.iterdir()}
    found[run / METRICS] = lambda: read_records(run / METRICS)
    found[run / IDENTITY] = found[run / RESOLVED] = lambda: read_run_identity(run)
    campaign.mkdir()
    ledger = Ledger(campaign / "ledger.jsonl")
    for step in ("data", "hope"):
        ledger.append(Attempt(step, ("nested-lm", "train"), "0" * 16, "2026-01-01", "2026-01-01", 0, 1.5, False))
    write_manifest(campaign, CampaignManifest(schema_version=1, name="a", title="A", data=("d",), runs=(), steps=()))
    found[campaign / "ledger.jsonl"] = lambda: Ledger(campaign / "ledger.jsonl").attempts
    found[campaign / "campaign.json"] = lambda: read_manifest(campaign)
    for read in found.values():
        read()
    return found


def flips(folder: Path, trials: int) -> Outcome:
    """One random bit of one file after another."""
    rng = random.Random(3)

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    return _changed(folder, trials, change, may_be_whole=False)


def malformed(folder: Path, trials: int) -> Outcome:
    """Nonsense, random bytes, or a file that is cut short: an error of ours, never a traceback.

    A log or ledger that is cut short was being written: its whole lines are read. The last newline means nothing.
    """
    rng = random.Random(4)

    def change(content: bytes) -> bytes:
        kind = rng.randrange(3)
        if kind == 0:
            return rng.choice(_NONSENSE)
        return rng.randbytes(rng.randrange(200)) if kind == 1 else content[: rng.randrange(len(content) - 1)]

    return _changed(folder, trials, change, may_be_whole=True)


def _changed(folder: Path, trials: int, change: Callable[[bytes], bytes], *, may_be_whole: bool) -> Outcome:
    outcome = Outcome()
    files = _stored_files(folder)
    for number in range(trials):
        path = list(files)[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(change(content))
        outcome.tried += 1
        try:
            files[path]()
        except NestedLMError:
            pass
        except Exception as error:
            outcome.failures.append(f"{path.name}: {type(error).__name__}: {error}")
        else:
            outcome.check(may_be_whole and path.suffix == ".jsonl", f"{path.name}: a change was not noticed")
        path.write_bytes(content)
    outcome.notes.append(f"{len(files)} files")
    return outcome
