"""A campaign with an ablation grid, as its steps leave it, with numbers that are known."""

import json
from pathlib import Path

from nested_lm.config.load import dump_resolved
from nested_lm_lab.evaluation.results import write_result
from nested_lm_lab.report.manifest import CampaignManifest, GridEntry, RunEntry, VariantEntry, write_manifest
from tests.lab.report.fake_runs import BITS, PARAMETERS, _language_modelling, _record, _result, _write_metrics, preset

SEED_OFFSETS = {1: 0.0, 2: 0.02, 3: -0.01}  # nats a token that a seed is worse in every arm
LOSS = 3.6


def variant(name: str, **changes: object) -> VariantEntry:
    settings = {
        "name": name,
        "factor": "write rule",
        "change": f"what {name} does",
        "delta": ("model.mixer.erase=none",),
        "balance": (),
        "against": "base",
        "row": None,
        "reversed": False,
    }
    return VariantEntry.model_validate(settings | changes)


def write_grid(
    root: Path,
    effects: dict[str, tuple[float, ...]],
    variants: tuple[VariantEntry, ...],
    *,
    missing: tuple[str, ...] = (),
    parameters: dict[str, int] | None = None,
) -> Path:
    """Write the base and the variants.

    effects: by variant, nats a token added to the base in seed 1, 2, 3. missing: runs such as `no-k-seed2` that were
    never trained.
    """
    entries = []
    for arm, added in {"base": (0.0,) * len(SEED_OFFSETS), **effects}.items():
        for (seed, offset), extra in zip(SEED_OFFSETS.items(), added, strict=True):
            name = f"{arm}-seed{seed}"
            entries.append(
                RunEntry(step=f"g.{name}", name=name, folder=f"runs/{name}", evaluated=True, grid="g", arm=arm)
            )
            if name not in missing:
                _write_run(root / "runs" / name, seed, LOSS + offset + extra, (parameters or {}).get(arm))
    grid = GridEntry(id="g", title="A grid", base="hope/demo", seeds=tuple(SEED_OFFSETS), variants=variants)
    manifest = CampaignManifest(
        schema_version=1,
        name="grid",
        title="What each part is worth",
        data=(),
        runs=tuple(entries),
        steps=(),
        grids=(grid,),
    )
    write_manifest(root, manifest)
    return root


def _write_run(folder: Path, seed: int, loss: float, parameters: int | None) -> None:
    config = preset("hope", f"artifacts/{folder.name}", seed)
    record = _record(config, parameters or PARAMETERS["hope"])
    folder.mkdir(parents=True)
    dump_resolved(config, folder / "config.resolved.yaml")
    (folder / "run.json").write_text(json.dumps(record))
    _write_metrics(folder / "metrics.jsonl", config, "hope")
    result = _result(config, record, _language_modelling("hope", loss), {})
    write_result(folder / "results" / "language_modelling.json", result)


def bits_of(nats: float, folder: Path) -> float:
    """What so many nats a token are in bits per byte, on the fake documents."""
    result = json.loads((folder / "results" / "language_modelling.json").read_text())
    documents = result["metrics"]["documents"]
    return BITS * nats / LOSS * sum(documents["window_nats"]) / sum(documents["bytes"])
