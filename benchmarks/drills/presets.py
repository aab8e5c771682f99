"""Malformed presets: none may end in a traceback or take longer than a few seconds.

`python -m benchmarks.drills presets` draws presets of every kind, damages each in one of the ways below,
and loads it as a verb would. Right answers are a configuration or one `NestedLMError`.
"""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.drills.drill import Outcome
from nested_lm.cli.main import describe_run
from nested_lm.config.compose import compose_preset, find_preset, preset_names
from nested_lm.config.load import load_ablation, load_campaign, load_data, load_evaluation, load_run
from nested_lm.config.run import RunConfig
from nested_lm.errors import NestedLMError

LONGEST_S = 5
"""Processor seconds after which loading a preset counts as hanging."""

LOADERS: dict[str, Callable[[str], Any]] = {
    "hope": load_run,
    "baselines": load_run,
    "data": load_data,
    "eval": load_evaluation,
    "campaign": load_campaign,
    "ablations": load_ablation,
}

VALUES = (
    *(0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**12, 10**40, -(10**40), 1e-300, 1e300, 0.5, 1.5, float("nan"), float("inf")),
    *(True, False, None, "", " ", "x", "~", "null", "1e3", "\ud800", "\x00", "ü" * 300, "a" * 5000, "/dev/zero"),
    *("${name}", "${nothing}", "${oc.env:HOME}", "${oc.decode:1}", "${${name}}", "${", "$", "???", "../..", "~/x"),
    *([], {}, [[]], [None], [1, "a"], [{}] * 300, {"kind": "x"}, {"kind": None}, {"": 1}, {1: 2}),
    {"_target_": "os.system"},
)
TEXTS = (
    *("\t", "{", "}", "[", "]", ":", "- ", "&a ", "*a", "<<: *a\n", "!!int ", "!x ", "%YAML 9\n", "---\n", "...\n"),
    *("? ", "| \n", "> \n", "\x00", "\x85", "\u2028", "\ufeff", "${", "'", '"', "#", "@", "`"),
    *("hydra: {}\n", "defaults: 3\n", "[" * 200, "{a: " * 200),
)


class _Hangs(BaseException):
    """Raised by the alarm; no `Exception`, so that nothing under test catches it."""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # of this process, however busy the machine is
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def damaged(rng: random.Random, name: str) -> str:
    """Text of a preset with one to three kinds of damage."""
    text = find_preset(name).file.read_text(encoding="utf-8")
    for _ in range(rng.randint(1, 3)):
        text = rng.choice((_another_value, _another_value, _another_text, _moved_lines, _composed_value))(
            rng, text, name
        )
    return text


def _another_value(rng: random.Random, text: str, _: str) -> str:
    """Replace one value of the file, or add one."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    if not isinstance(tree, dict) or not tree:
        return text
    node, key = tree, rng.choice(list(tree))
    while isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node))
    node[key if rng.random() < 0.8 else f"{key}x"] = rng.choice(VALUES)
    return _header(text) + yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


def _composed_value(rng: random.Random, text: str, name: str) -> str:
    """Set a field that the file gets from another one."""
    try:
        tree = yaml.safe_load(text)
        node = compose_preset(find_preset(name), ()).values
    except (yaml.YAMLError, NestedLMError, RecursionError, ValueError):
        return text
    if not isinstance(tree, dict):
        return text
    place = tree
    while True:
        key = rng.choice(list(node))
        if not isinstance(node[key], dict) or not node[key] or rng.random() < 0.1:
            place[key] = rng.choice(VALUES)
            return _header(text) + yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        node = node[key]
        place[key] = place.get(key) if isinstance(place.get(key), dict) else {}
        place = place[key]


def _header(text: str) -> str:
    first = text.split("\n", 1)[0]
    return first + "\n" if first.startswith("# @package") else ""


def _another_text(rng: random.Random, text: str, _: str) -> str:
    """Put a few characters somewhere, or drop some."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(TEXTS) + text[at + rng.choice((0, 0, 1, 20)) :]


def _moved_lines(rng: random.Random, text: str, _: str) -> str:
    lines = text.splitlines(keepends=True)
    if len(lines) > 1:
        line = lines.pop(rng.randrange(len(lines)))
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(("", " ", "  ", "\t")) + line)
    return "".join(lines)


def presets(folder: Path, trials: int, seed: int = 0) -> Outcome:
    """Load damaged presets. seed: of the damage."""
    rng = random.Random(seed)
    names = [name for name in preset_names() if name.partition("/")[0] in LOADERS]
    describe_run(load_run("hope/demo"))  # imports what takes seconds
    outcome, file = Outcome(), folder / "damaged.yaml"
    for number in range(trials):
        name = rng.choice(names)
        file.write_text(damaged(rng, name), encoding="utf-8", errors="surrogatepass")
        wrong = _wrong(LOADERS[name.partition("/")[0]], str(file))
        outcome.tried += 1
        outcome.check(wrong is None, f"case {number} of seed {seed}, from {name}: {wrong}")
    return outcome


def _wrong(load: Callable[[str], Any], file: str) -> str | None:
    try:
        with _alarm():
            config = load(file)
            if isinstance(config, RunConfig):
                describe_run(config)
    except NestedLMError:
        return None
    except _Hangs:
        return f"no answer in {LONGEST_S} s"
    except Exception as error:  # a traceback is what the drill looks for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
