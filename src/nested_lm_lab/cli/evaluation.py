"""The `nested-lm eval` verbs: a checkpoint on the tasks of its settings, and the larger suites by name."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from nested_lm.cli.arguments import Device, SettingsOverrides, reports_errors, require_device
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm_lab.cli import continual as cli_continual
from nested_lm_lab.cli import needles as cli_needles
from nested_lm_lab.cli import zeroshot as cli_zeroshot


class _RunFolderByDefault(TyperGroup):
    """A group whose verb `run` may be left out: `eval RUN_DIR` is `eval run RUN_DIR`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(
    cls=_RunFolderByDefault,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Evaluate a trained model. `eval RUN_DIR` is short for `eval run RUN_DIR`.",
)


@evaluation.command("run")
@reports_errors
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder with checkpoints.")],
    overrides: SettingsOverrides = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated tasks; all that the settings ask for by default.")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="What to measure, such as eval/demo; the run's own settings by default."),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU when there is one, unless the run was configured for the CPU.")
    ] = Device.auto,
) -> None:
    """Evaluate the newest checkpoint of a run; results go to RUN_DIR/results."""
    names = None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    if names == ():
        raise ConfigError(f"--tasks {tasks!r} names no task; write names with commas between, or leave it out")
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a folder; name a run folder that `nested-lm train` wrote")
    if overrides and settings is None:
        raise ConfigError(f"{overrides[0]!r} changes settings that are not named; name them with --settings PRESET")
    require_device(device)
    from nested_lm.config.load import load_evaluation
    from nested_lm_lab.evaluation.runner import evaluate_run

    chosen = None if settings is None else load_evaluation(settings, overrides or ())
    evaluate_run(run_dir, names, settings=chosen, device=None if device is Device.auto else device.value)


evaluation.command("niah")(cli_needles.niah)
evaluation.command("babilong")(cli_needles.babilong)
evaluation.command("books")(cli_needles.books)
evaluation.command("continual")(cli_continual.continual)
evaluation.command("zeroshot")(cli_zeroshot.zeroshot)
evaluation.command("zeroshot-data")(cli_zeroshot.zeroshot_data)
evaluation.command("zeroshot-compare")(cli_zeroshot.zeroshot_compare)
