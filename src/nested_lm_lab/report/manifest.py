"""`campaign.json`: what a campaign folder holds, so that a report needs nothing but the folder."""

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from nested_lm.config.section import Name, Section
from nested_lm.errors import ReportError
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.sealed import seal, unseal

MANIFEST_NAME = "campaign.json"


class StepEntry(Section):
    """One step of the campaign and the command that runs it again by hand, once ${variables.NAME} are put in."""

    id: Name
    kind: Literal["data", "train", "eval", "report"]
    arguments: tuple[str, ...]  # of `nested-lm`


class RunEntry(Section):
    """One training run. `folder` is relative to the campaign folder."""

    step: Name
    name: Name
    folder: str
    evaluated: bool  # an eval step names it
    grid: Name | None = None  # id of the ablation grid it belongs to
    arm: Name | None = None  # `base`, or the variant of that grid


class VariantEntry(Section):
    """One variant of a grid. row: of the paper's Table 6; reversed: our variant puts in what that row leaves out."""

    name: Name
    factor: str
    change: str
    delta: tuple[str, ...]
    balance: tuple[str, ...]
    against: Name  # the arm it is compared with
    row: str | None
    reversed: bool


class GridEntry(Section):
    """An ablation grid: base preset, seeds and variants in the order of the preset."""

    id: Name
    title: str
    base: str
    seeds: tuple[int, ...]
    variants: tuple[VariantEntry, ...]


class CampaignManifest(Section):
    """Steps, runs and data folders of one campaign, in the order of its preset."""

    schema_version: Literal[1]
    name: Name
    title: str
    data: tuple[str, ...]  # folders, relative to the campaign folder
    runs: tuple[RunEntry, ...]
    steps: tuple[StepEntry, ...]
    grids: tuple[GridEntry, ...] = ()


def write_manifest(folder: Path, manifest: CampaignManifest) -> None:
    """Write `campaign.json`, sealed. Raises DataError when the disk refuses."""
    write_atomically(folder / MANIFEST_NAME, seal(manifest.model_dump(mode="json"), indent=2))


def read_manifest(folder: Path) -> CampaignManifest:
    """Read `campaign.json`. Raises ReportError when the folder is not a campaign or the file is damaged."""
    path = folder / MANIFEST_NAME
    try:
        document, _ = unseal(path.read_bytes())
        return CampaignManifest.model_validate_json(json.dumps(document))
    except (FileNotFoundError, NotADirectoryError):
        raise ReportError(
            f"{folder} is not a campaign folder: it holds no {MANIFEST_NAME}\n"
            "  `nested-lm campaign PRESET` writes one into the preset's output_dir; name that folder."
        ) from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}; make it readable") from error
    except ValueError as error:
        found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ReportError(
            f"{path} is not a campaign manifest: {found}\n"
            "  It was changed or cut short. `nested-lm campaign PRESET` writes it again."
        ) from error
