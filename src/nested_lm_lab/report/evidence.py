"""Keeps what a published report rests on: the small files of a campaign, without checkpoints, for version control."""

import json
import os
import shutil
from pathlib import Path

from nested_lm.errors import ReportError
from nested_lm.train.metrics import read_records
from nested_lm_lab.evaluation.results import load_result
from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.manifest import MANIFEST_NAME, RunEntry, read_manifest, write_manifest

_COPIED = ("config.resolved.yaml", "run.json", "wandb.json")


def publish(campaign_dir: Path, target: Path) -> Path:
    """Copy a campaign's evidence to `target`, which becomes a campaign folder that `nested-lm report` reads.

    Of each run: its configuration, identity, result files, and of the metrics the evaluations, the last step and the
    end. Everything is checked as for a report first; a target that holds something else is left alone.

    Raises ReportError when the campaign cannot be reported, or the target is no evidence of this campaign.
    """
    campaign = collect(campaign_dir)
    manifest = campaign.manifest
    _refuse_foreign(target, manifest.name)
    aside = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        runs = tuple(_copy_run(campaign_dir, entry, aside) for entry in manifest.runs)
        data = tuple(_copy_data(campaign_dir, folder, index, aside) for index, folder in enumerate(manifest.data))
        write_manifest(aside, manifest.model_copy(update={"runs": runs, "data": data}))
        if target.exists():
            shutil.rmtree(target)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _refuse_foreign(target: Path, name: str) -> None:
    if not target.exists():
        return
    manifest = target / MANIFEST_NAME
    found = None
    if manifest.exists():
        found = read_manifest(target).name
    if found != name:
        what = f"that of campaign {found!r}" if found else f"a folder without {MANIFEST_NAME}"
        raise ReportError(
            f"{target} is {what}, not evidence of campaign {name!r}; it would be replaced\n"
            "  Move it away, or name another folder."
        )


def _copy_run(root: Path, entry: RunEntry, target: Path) -> RunEntry:
    """Copy one run; its folder is then named after its step."""
    source, copy = root / entry.folder, target / "runs" / entry.step
    copy.mkdir(parents=True)
    for name in _COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, copy / name)
    if (source / "metrics.jsonl").exists():
        rows = read_records(source / "metrics.jsonl")
        last = max((index for index, row in enumerate(rows) if row["event"] == "step"), default=-1)
        kept = [row for index, row in enumerate(rows) if row["event"] != "step" or index == last]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    for result in sorted((source / "results").glob("*.json")):
        load_result(result)
        (copy / "results").mkdir(exist_ok=True)
        shutil.copyfile(result, copy / "results" / result.name)
    return entry.model_copy(update={"folder": f"runs/{entry.step}"})


def _copy_data(root: Path, folder: str, index: int, target: Path) -> str:
    """Copy the description of a data set, not its tokens."""
    copy = target / "data" / f"{index}"
    copy.mkdir(parents=True)
    if (root / folder / "manifest.json").exists():
        shutil.copyfile(root / folder / "manifest.json", copy / "manifest.json")
    return f"data/{index}"
