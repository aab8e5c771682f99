"""The `nested-lm eval` verbs: a run on the tasks of its settings, and one verb for each larger task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nested_lm.cli.arguments import Checkpoint, Device, SettingsOverrides, reports_errors, require_device
from nested_lm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

OnDevice = Annotated[Device, typer.Option(help="auto: a GPU when there is one.")]


class _EvalGroup(TyperGroup):
    """A group whose verb `run` may be left out: `eval RUN_DIR` is `eval run RUN_DIR`.

    A verb is made of its task's settings when it is asked for.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.list_commands(ctx) and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # noqa: ARG002
        from nested_lm_lab.evaluation.registry import own_verbs

        return ["run", *(entry.kind for entry in own_verbs()), "continual", "zeroshot-data", "zeroshot-compare"]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        app = typer.Typer(rich_markup_mode="rich")
        app.command(cmd_name)(_verb(cmd_name))
        made = typer.main.get_command(app)
        made.name = cmd_name
        return made


evaluation = typer.Typer(
    cls=_EvalGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Evaluate a trained model. `eval RUN_DIR` is short for `eval run RUN_DIR`.",
)


def _verb(name: str) -> Any:
    """The function of a verb."""
    if name == "run":
        return evaluate
    if name == "continual":
        from nested_lm_lab.cli.continual import continual

        return continual
    if name.startswith("zeroshot-"):
        from nested_lm_lab.cli import zeroshot

        return zeroshot.zeroshot_data if name == "zeroshot-data" else zeroshot.zeroshot_compare
    return _verb_of_task(name)


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
    from nested_lm_lab.evaluation.run import evaluate_run

    chosen = None if settings is None else load_evaluation(settings, overrides or ())
    evaluate_run(run_dir, names, settings=chosen, device=None if device is Device.auto else device.value)


def _verb_of_task(kind: str) -> Any:
    """The verb of a task: its settings as options, and where the result goes."""
    from nested_lm_lab.cli.options import with_options
    from nested_lm_lab.evaluation.registry import find_task

    task = find_task(kind)

    def verb(
        source: Checkpoint,
        settings: Any,
        label: Annotated[
            str | None, typer.Option(help=f"Keep the result beside the others, as {kind}_LABEL.json.")
        ] = None,
        output: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Result file; where the task puts it by default.")
        ] = None,
        device: OnDevice = Device.auto,
    ) -> None:
        require_device(device)
        from nested_lm_lab.evaluation import publish as publishing
        from nested_lm_lab.evaluation.subject import Subject

        subject = Subject.open(source, device=torch_device(device), report=typer.echo)
        publishing.publish(task(settings), subject, label=label, output=output)

    verb.__doc__ = task.__doc__
    return reports_errors(with_options(task.Settings)(verb))


def torch_device(device: Device) -> "torch.device":
    """The device that a verb asks for; auto is a GPU when there is one."""
    import torch

    require_device(device)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value
    return torch.device(chosen)
