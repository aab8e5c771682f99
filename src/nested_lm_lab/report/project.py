"""The project's own documents, from the evidence of its published campaigns: same evidence, same bytes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nested_lm.errors import ReportError
from nested_lm.train.metrics import read_records
from nested_lm_lab.report.ablation_parts import READING, ablation_parts, origin
from nested_lm_lab.report.ablations import grid_reports
from nested_lm_lab.report.collect import Campaign, collect
from nested_lm_lab.report.document import Document, Part, write_html, write_markdown
from nested_lm_lab.report.findings import shortened
from nested_lm_lab.report.manifest import MANIFEST_NAME, read_manifest
from nested_lm_lab.report.papers import Claim, papers
from nested_lm_lab.report.plot_style import short_count
from nested_lm_lab.report.render import campaign_parts
from nested_lm_lab.report.tables import Cell, Table

COMMAND = "nested-lm report"


class Folders(NamedTuple):
    """Where a project keeps things. evidence: published campaigns, which alone its documents are made of."""

    root: Path

    @property
    def evidence(self) -> Path:
        """Published campaigns."""
        return self.root / "eval"


def write_project(folders: Folders) -> list[Path]:
    """Write docs/experiments_report.md, reports/ablations.md, reports/dashboard.html and docs/stage2_progress.md.

    Raises ReportError when no campaign has been published, or results of one may not share a table.
    """
    campaigns = [collect(path.parent) for path in sorted(folders.evidence.glob(f"*/{MANIFEST_NAME}"))]
    if not campaigns:
        raise ReportError(
            f"{folders.evidence} holds no published campaign, so there is nothing to report\n"
            "  Run a campaign, then `nested-lm report CAMPAIGN_DIR --publish` in the project's root."
        )
    experiments = _experiments(campaigns)
    grids = [campaign for campaign in campaigns if campaign.manifest.grids]
    written = [
        write_markdown(experiments, folders.root / "docs" / "experiments_report.md"),
        write_html(_dashboard(experiments, grids), folders.root / "reports" / "dashboard.html"),
        write_markdown(_progress(folders), folders.root / "docs" / "stage2_progress.md"),
    ]
    if grids:
        written.append(write_markdown(_ablations(grids), folders.root / "reports" / "ablations.md"))
    return written


def _experiments(campaigns: Sequence[Campaign]) -> Document:
    lead = [
        "What this project has measured, what the papers print beside it, and what is not reproduced. Every number "
        "comes from a checked result file below eval/; tables refuse rows that may not be compared."
    ]
    parts = []
    for campaign in campaigns:
        plain, name = campaign.plain(), campaign.manifest.name
        if plain.runs:
            parts += campaign_parts(plain, prefix=f"{name}-")
            parts.append(Part(f"Where the numbers of {name} come from", 3, points=origin(plain), folded=True))
    for campaign in campaigns:
        if campaign.manifest.grids:
            text = f"Campaign {campaign.manifest.name}. Its tables are in reports/ablations.md."
            points = [line for grid in grid_reports(campaign) for line in grid.summary]
            parts.append(Part(campaign.manifest.title, text=[text], points=points))
    parts += [*_paper_parts(), Part("What is not reproduced", points=_open_claims(campaigns))]
    return Document("Experiments", COMMAND, lead, parts, figures="figures/experiments")


def _paper_parts() -> list[Part]:
    """The papers' own numbers, apart from ours: other models, data and budgets."""
    found = papers()
    language = Table(
        ("model", "size, budget", "Wikitext ppl", "LAMBADA ppl", "mean accuracy", "source"),
        tuple(
            (
                Cell(row.model),
                Cell(row.size),
                Cell(f"{row.wiki:.2f}"),
                Cell(f"{row.lambada:.2f}"),
                Cell(f"{row.average:.2f}"),
                Cell(row.source),
            )
            for row in found.language.rows
        ),
    )
    needles = Table(
        ("model, task", "2k", "4k", "8k", "16k"),
        tuple(
            (Cell(f"{row.model}, {row.task}"), *(Cell(f"{share:.1f}") for share in row.found))
            for row in found.needles.rows
        ),
    )
    text = "Not comparable with ours: larger models, more text, another tokenizer. No paper gives seeds or intervals."
    return [
        Part("The papers' numbers", text=[text]),
        Part("Language and zero-shot tasks", 3, text=[found.language.source + "."], table=language),
        Part("Needles", 3, text=[found.needles.source + "."], table=needles),
    ]


def _open_claims(campaigns: Sequence[Campaign]) -> list[str]:
    return [line for claim in papers().claims if (line := _open(claim, campaigns)) is not None]


def _open(claim: Claim, campaigns: Sequence[Campaign]) -> str | None:
    """Why a claim has not been tested here; None when a run that is large enough has a result of its kind."""
    sizes = [
        run.parameters
        for campaign in campaigns
        for run in campaign.runs
        if run.parameters is not None and _has(run.results, run.entry.grid, claim.kind)
    ]
    needed = short_count(claim.needs_parameters)
    if not sizes:
        return f"{claim.claim}: no result of kind {claim.kind} has been published; it takes {needed} parameters."
    if max(sizes) < claim.needs_parameters:
        return (
            f"{claim.claim}: the largest model with a result of kind {claim.kind} has {short_count(max(sizes))} "
            f"parameters; it takes {needed}."
        )
    return None


def _has(results: object, grid: str | None, kind: str) -> bool:
    if kind == "ablations":
        return grid is not None
    assert isinstance(results, dict)
    return any(result.metrics.kind == kind for result in results.values())


def _ablations(campaigns: Sequence[Campaign]) -> Document:
    parts: list[Part] = []
    for campaign in campaigns:
        name = campaign.manifest.name
        for grid in grid_reports(campaign):
            parts += ablation_parts(grid, name=name)
        parts.append(Part(f"Where the numbers of {name} come from", 3, points=origin(campaign)))
        if campaign.notes:
            parts.append(Part(f"Missing from {name}", 3, points=list(campaign.notes)))
    return Document("Ablations", COMMAND, [READING], parts)


def _dashboard(experiments: Document, grids: Sequence[Campaign]) -> Document:
    """Everything on one page; the long tables of ablations and of papers are folded."""
    found = _ablations(grids).parts if grids else []
    parts = [
        replace(part, folded=part.folded or (part.level > 2 and part.table is not None))
        for part in [*experiments.parts, *found]
    ]
    return Document("nested-lm: experiments", COMMAND, [], parts)


def _progress(folders: Folders) -> Document:
    """State of every run of the published campaigns; working folders differ from machine to machine."""
    parts = []
    for path in sorted(folders.evidence.glob(f"*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        rows = tuple(_state_row(run.name, path.parent / run.folder) for run in manifest.runs)
        done = sum(row[1].text == "finished" for row in rows)
        where = path.parent.relative_to(folders.root).as_posix()
        text = f"{manifest.title}. {done} of {len(rows)} runs finished."
        table = Table(("run", "state", "tokens", "results", "W&B", "commit"), rows)
        parts.append(Part(where, text=[text], table=table))
    lead = [
        "Every run of every published campaign below eval/: how far it is, and where its curves are. What runs in "
        "artifacts/ of one machine is said there by: nested-lm campaign PRESET --dry-run."
    ]
    return Document("Progress of the runs", COMMAND, lead, parts)


def _state_row(name: str, folder: Path) -> tuple[Cell, ...]:
    record = folder / "run.json"
    if not record.exists():
        return (Cell(name), Cell("not started"), *(Cell("-"),) * 4)
    rows = read_records(folder / "metrics.jsonl")
    steps = [row for row in rows if row["event"] == "step"]
    bad = sum(row["event"] == "nonfinite" for row in rows)
    state = "finished" if any(row["event"] == "done" for row in rows) else "unfinished"
    link = folder / "wandb.json"
    address = json.loads(link.read_text(encoding="utf-8"))["url"] if link.exists() else None
    results = len(list((folder / "results").glob("*.json")))
    return (
        Cell(name),
        Cell(state, f"{bad} steps not finite" if bad else ""),
        Cell(f"{steps[-1]['tokens']:,}" if steps else "0"),
        Cell(str(results)),
        Cell("-" if address is None else "curves", link=address or ""),
        Cell(shortened(str(json.loads(record.read_text(encoding="utf-8")).get("commit")))),
    )
