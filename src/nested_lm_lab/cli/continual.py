"""The verb of `nested-lm eval` that measures continual learning."""

from pathlib import Path
from typing import Annotated

import typer

from nested_lm.cli.arguments import Device, reports_errors, require_device
from nested_lm.errors import ConfigError
from nested_lm_lab.cli.options import with_options
from nested_lm_lab.tasks.continual.settings import ContinualSettings


@reports_errors
@with_options(ContinualSettings)
def continual(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_CHECKPOINT...", help="Run folders (newest checkpoint) or checkpoints."),
    ],
    settings: ContinualSettings,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results go; the run's results by default.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also put the runs side by side, as a clock sweep.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """Continual learning: forgetting, regret, lesions, ticks of the levels; classes, facts and languages by reading."""
    if compare is not None and len(sources) < 2:
        raise ConfigError("--compare puts runs side by side; name two or more")
    require_device(device)
    from nested_lm_lab.cli.evaluation import torch_device
    from nested_lm_lab.tasks.continual.comparison import compare_runs
    from nested_lm_lab.tasks.continual.evaluate import evaluate_continual

    evaluate_continual(sources, settings, output_dir=output_dir, device=torch_device(device), report=typer.echo)
    if compare is not None:
        compare_runs(sources, compare, settings=settings, report=typer.echo)
