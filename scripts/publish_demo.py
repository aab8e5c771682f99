"""Keep the results of `make demo` in eval/demo, and put their numbers and their figure where the README shows them.

    make demo && .venv/bin/python scripts/publish_demo.py

Numbers that the README gives in sentences of its own are printed, to be read beside it: those are written by hand.
"""

import re
import shutil
import sys
from pathlib import Path

from nested_lm.errors import ReportError
from nested_lm_lab.evaluation.results import load_result, require_comparable
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.schema import ResultFile

ROOT = Path(__file__).parents[1]
CAMPAIGN = Path("artifacts/demo")
KEPT = ("config.resolved.yaml", "run.json")
ARMS = {"hope-demo": "Hope", "transformer-demo": "Transformer++"}


def publish(root: Path) -> list[str]:
    """Copy the evidence and rewrite the README. Returns lines for the sentences that are written by hand.

    Raises:
        ReportError: a result is missing, was edited or may not stand beside the other, or the README has no place for
            a number; nothing is copied then.
    """
    runs = root / CAMPAIGN / "runs"
    language = {name: load_result(runs / name / "results" / "language_modelling.json") for name in ARMS}
    require_comparable(list(language.values()))
    readme = root / "README.md"
    text = rewrite(readme.read_text(encoding="utf-8"), language)
    for run in sorted(path for path in runs.iterdir() if (path / "results").is_dir()):
        target = root / "eval" / "demo" / run.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in (*(run / name for name in KEPT), *sorted((run / "results").glob("*.json"))):
            shutil.copyfile(file, target / file.name)
    shutil.copyfile(root / CAMPAIGN / "figures" / "overview.svg", root / "docs" / "figures" / "demo.svg")
    readme.write_text(text, encoding="utf-8")
    return [line for name, result in language.items() for line in _by_hand(name, result, runs / name)]


def rewrite(text: str, language: dict[str, ResultFile]) -> str:
    """The README with the numbers of these results."""
    for name, label in ARMS.items():
        bits = language[name].metrics.window.bits_per_byte
        text = _replace(text, rf"{re.escape(label)}\s+\*\*[\d.]+\*\*", f"{label} **{bits.value:.3f}**")
        text = _replace(text, rf"({re.escape(label)} \*\*[^(]*)\([^)]*\)", rf"\g<1>({_span(bits)})")
    first = language["hope-demo"]
    floor = first.metrics.bigram.bits_per_byte
    text = _replace(text, r"bigram\s+floor\s+[\d.]+\s+\([^)]*\)", f"bigram floor {floor.value:.3f} ({_span(floor)})")
    size = f"{first.identity.parameters / 1e6:.2f} M parameters and {first.identity.tokens:,} training\\g<1>tokens"
    text = _replace(text, r"[\d.]+ M parameters and [\d,]+ training(\s)tokens", size)
    return _replace(text, r"\d+ held-out documents", f"{first.metrics.window.bits_per_byte.n} held-out documents")


def _span(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


def _replace(text: str, pattern: str, new: str) -> str:
    found, count = re.subn(pattern, new, text, count=1)
    if not count:
        raise ReportError(f"README.md: nothing is written like {pattern!r}; put the sentence about the demo back")
    return found


def _by_hand(name: str, result: ResultFile, run: Path) -> list[str]:
    lines = []
    gain = result.metrics.streaming_gain
    if gain is not None:
        lines.append(f"{name}: carrying the state on gains {gain.value:+.3f} ({_span(gain)})")
    passkey = load_result(run / "results" / "passkey.json").metrics
    saved = ", ".join(f"{one.length}: {one.worth.value:+.3f} ({_span(one.worth)})" for one in passkey.lengths)
    return [*lines, f"{name}: nats that a passkey saves, by length: {saved}"]


if __name__ == "__main__":
    try:
        for line in publish(ROOT):
            print(line)
    except (ReportError, FileNotFoundError) as error:
        sys.exit(f"publish_demo: {error}")
