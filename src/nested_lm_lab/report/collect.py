"""Reads a campaign folder into one typed structure; refuses results that may not share a table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nested_lm.config.load import parse_run
from nested_lm.config.mixers import SelfModifying
from nested_lm.config.run import RunConfig
from nested_lm.data.manifest import Manifest
from nested_lm.data.manifest import read_manifest as read_data_manifest
from nested_lm.errors import ConfigError, DataError, ReportError
from nested_lm.train.metrics import read_records
from nested_lm.train.run_folder import read_run_identity
from nested_lm_lab.evaluation.registry import find_task
from nested_lm_lab.evaluation.results import differences, load_result
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.report.manifest import CampaignManifest, RunEntry, read_manifest

ARM_NAMES = {
    "self_modifying+cms": "Hope",
    "attention+cms": "Hope-Attention",
    "attention+swiglu": "Transformer++",
    "linear_attention+swiglu": "linear attention",
    "delta_net+swiglu": "DeltaNet",
    "gated_delta_net+swiglu": "Gated DeltaNet",
    "titans_mac+swiglu": "Titans MAC",
    "titans_mag+swiglu": "Titans MAG",
    "titans_mal+swiglu": "Titans MAL",
}
"""How arms (mixer and channel memory) are written in tables; others keep the kinds of their parts."""


@dataclass(frozen=True)
class Trace:
    """The lines of one kind of event in `metrics.jsonl`, in the order of steps."""

    rows: tuple[Mapping[str, Any], ...]

    def columns(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Values of two keys from the rows that have both."""
        rows = [row for row in self.rows if _is_number(row.get(x)) and _is_number(row.get(y))]
        return [float(row[x]) for row in rows], [float(row[y]) for row in rows]

    def keys(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))

    def last(self, key: str) -> float | None:
        """Value of a key in the last row that has it."""
        return next((float(row[key]) for row in reversed(self.rows) if _is_number(row.get(key))), None)


@dataclass(frozen=True)
class Run:
    """One run folder. `record` is run.json; results by task."""

    entry: RunEntry
    folder: Path
    config: RunConfig
    record: Mapping[str, Any]
    steps: Trace
    evaluations: Trace
    finished: bool
    nonfinite: int  # steps skipped because a value was not finite
    results: Mapping[str, ResultFile] = field(default_factory=dict)

    @property
    def chronological(self) -> bool:
        """Whether it read the periods in the order of time."""
        return self.config.train.stream.kind == "chronological"

    @property
    def order(self) -> str:
        """How it read the training text: mixed, or its periods forward, in reverse or shuffled."""
        stream = self.config.train.stream
        return stream.order if stream.kind == "chronological" else "mixed"

    @property
    def arm(self) -> str:
        """Which kind of model it is; of an ablation grid, the base or the name of the variant."""
        if self.entry.arm is not None:
            return self.entry.arm
        mixer, channel = self.config.model.mixer, self.config.model.channel
        if isinstance(mixer, SelfModifying) and mixer.targets == "values" and channel.kind == "swiglu":
            return "Titans LMM"
        parts = f"{mixer.kind}+{channel.kind}"
        return ARM_NAMES.get(parts, parts)

    @property
    def parameters(self) -> int | None:
        """Number of parameters, from run.json."""
        found = self.record.get("parameters")
        return found if isinstance(found, int) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Training tokens a second over the whole run."""
        tokens, seconds = self.steps.last("tokens"), self.steps.last("seconds")
        return tokens / seconds if tokens and seconds else None

    @property
    def speeds(self) -> list[float]:
        """Training tokens a second between logged steps; the first ones warm up and are left out."""
        tokens, seconds = self.steps.columns("tokens", "seconds")
        pairs = zip(tokens[2:], tokens[1:], seconds[2:], seconds[1:], strict=False)
        return [(t1 - t0) / (s1 - s0) for t1, t0, s1, s0 in pairs if s1 > s0]


@dataclass(frozen=True)
class Campaign:
    """Everything a report is made of. `notes` says what is missing, one sentence each."""

    folder: Path
    manifest: CampaignManifest
    runs: tuple[Run, ...]
    data: tuple[Manifest, ...]
    notes: tuple[str, ...]

    def with_result(self, task: str, *, chronological: bool = False) -> tuple[Run, ...]:
        """Runs of one kind that have a result of a task."""
        return tuple(run for run in self.runs if task in run.results and run.chronological == chronological)

    def plain(self) -> "Campaign":
        """The campaign without the runs of its ablation grids."""
        return replace(self, runs=tuple(run for run in self.runs if run.entry.grid is None))

    def label(self, run: Run) -> str:
        """The arm; with its seed, or the name of the run, where one arm ran several times."""
        twins = [other for other in self.runs if other.arm == run.arm and other.chronological == run.chronological]
        if len(twins) == 1:
            return run.arm
        if len({other.config.seed for other in twins}) == len(twins):
            return f"{run.arm}, seed {run.config.seed}"
        return f"{run.arm}, {run.config.name}"

    def firsts(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """The first run of every arm, for figures that would be too full with all seeds."""
        return tuple({run.arm: run for run in reversed(tuple(runs))}.values())[::-1]

    def arms(self) -> tuple[str, ...]:
        """All arms in the order of the preset."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))


def collect(folder: Path) -> Campaign:
    """Read a campaign folder.

    Raises ReportError when it is no campaign, a file is damaged, or two results may not share a table. What
    is merely missing (a run not trained yet, a task not run) becomes a note.
    """
    manifest = read_manifest(folder)
    notes: list[str] = []
    runs = [run for entry in manifest.runs if (run := _read_run(folder, entry, notes)) is not None]
    if not runs:
        raise ReportError(
            f"{folder}: no run of the campaign has been trained yet, so there is nothing to report\n"
            "  Run `nested-lm campaign PRESET` first; it continues where it stopped."
        )
    data = [found for name in manifest.data if (found := _read_data(folder, name, notes)) is not None]
    _refuse_mixtures(runs)
    return Campaign(folder, manifest, tuple(runs), tuple(data), tuple(notes))


def collect_run(folder: Path) -> Campaign:
    """Read one run folder as a campaign of one run. Raises ReportError when it is none, or a file is damaged."""
    entry = RunEntry(step="run", name=folder.resolve().name, folder=".", evaluated=True)
    notes: list[str] = []
    run = _read_run(folder, entry, notes)
    if run is None:
        raise ReportError(
            f"{folder} is no run folder that was trained: {notes[0]}\n  Name the output_dir of `nested-lm train`."
        )
    manifest = CampaignManifest(schema_version=1, name="run", title="", data=(), runs=(entry,), steps=())
    return Campaign(folder, manifest, (run,), (), tuple(notes))


def parameter_gap(runs: Iterable[Run]) -> float | None:
    """(largest - smallest) / largest number of parameters; None below two runs."""
    counts = sorted(run.parameters for run in runs if run.parameters is not None)
    return None if len(counts) < 2 else (counts[-1] - counts[0]) / counts[-1]


def _read_run(root: Path, entry: RunEntry, notes: list[str]) -> Run | None:
    folder = root / entry.folder
    paths = {name: folder / name for name in ("config.resolved.yaml", "run.json", "metrics.jsonl")}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        notes.append(f"Run {entry.name} (step {entry.step}) is left out: {entry.folder} has no {', '.join(missing)}.")
        return None
    events = read_records(paths["metrics.jsonl"])
    record = _read_identity(folder)
    results = _read_results(folder / "results", record, notes)
    finished = any(row["event"] == "done" for row in events)
    if not finished:
        notes.append(f"Run {entry.name} has not reached its token budget; its numbers are preliminary.")
    if not results:
        notes.append(f"Run {entry.name} has not been evaluated: {entry.folder}/results holds no result file.")
    return Run(
        entry=entry,
        folder=folder,
        config=_read_config(paths["config.resolved.yaml"]),
        record=record,
        steps=Trace(_kept_rows(events, "step")),
        evaluations=Trace(_kept_rows(events, "eval")),
        finished=finished,
        nonfinite=sum(row["event"] == "nonfinite" for row in events),
        results=results,
    )


def _read_config(path: Path) -> RunConfig:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not YAML: {error}\n  It was changed after training wrote it.") from error
    return parse_run(content, str(path))


def _read_identity(folder: Path) -> Mapping[str, Any]:
    try:
        return read_run_identity(folder)
    except ConfigError as error:
        raise ReportError(str(error)) from error


def _kept_rows(events: list[dict[str, Any]], kind: str) -> tuple[Mapping[str, Any], ...]:
    """Rows of one kind. Where a resumed run wrote a step again, the later row stands."""
    rows = {row["step"]: row for row in events if row["event"] == kind}
    return tuple(rows[step] for step in sorted(rows))


def _read_results(folder: Path, record: Mapping[str, Any], notes: list[str]) -> dict[str, ResultFile]:
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = load_result(path)
        if result.identity.config_hash != record.get("config_hash"):
            raise ReportError(
                f"{path} belongs to another run: its config_hash is {result.identity.config_hash}, "
                f"{folder.parent / 'run.json'} has {record.get('config_hash')}\n"
                f"  The run was trained again since. Run `nested-lm eval {folder.parent}`."
            )
        if result.task in results:
            raise ReportError(f"{folder} holds two results of task {result.task!r}; delete the one you do not mean")
        current, note = find_task(result.metrics.kind).current(result)
        if note is not None:
            notes.append(note)
        if current is not None:
            results[result.task] = current
    return results


def _read_data(root: Path, name: str, notes: list[str]) -> Manifest | None:
    try:
        return read_data_manifest(root / name)
    except DataError as error:
        why = str(error).splitlines()[0].replace(str(root / name), name)
        notes.append(f"The data set is not described: {why}.")
        return None


def _refuse_mixtures(runs: list[Run]) -> None:
    """Refuse results of one reading order from unlike conditions. Unequal size is let through: the report flags it."""
    for order in dict.fromkeys(run.order for run in runs):
        members = [run for run in runs if run.order == order]
        for task in sorted({task for run in members for task in run.results}):
            results = [run.results[task] for run in members if task in run.results]
            first = results[0]
            for other in results[1:]:
                found = [line for line in differences(first, other) if not line.startswith("parameters:")]
                if found:
                    lines = "\n".join(f"  {line}" for line in found)
                    raise ReportError(
                        f"{task} results of {first.identity.name!r} and {other.identity.name!r} "
                        f"may not share a table:\n{lines}\n"
                        "  Evaluate both runs on the same data with the same settings, or make two campaigns."
                    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
