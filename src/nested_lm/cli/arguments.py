"""What the verbs of the command line share: arguments, exit codes, and opening a checkpoint.

Nothing heavy is imported before a verb needs it.
"""

import functools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nested_lm.errors import NestedLMError

if TYPE_CHECKING:
    from nested_lm.checkpoint import LoadedCheckpoint

INTERRUPTED = 130

F = TypeVar("F", bound=Callable[..., Any])


def _changes(what: str, example: str) -> Any:
    return typer.Argument(metavar="[key=value]...", help=f"Changes to {what}, such as {example}.")


def _preset(example: str) -> Any:
    return typer.Argument(metavar="PRESET", help=f"Name such as {example} (`nested-lm presets`), or a YAML file.")


Overrides = Annotated[list[str] | None, _changes("the preset", "train.batch_size=8")]
DataOverrides = Annotated[list[str] | None, _changes("the preset", "tokenizer.vocab_size=4096")]
SettingsOverrides = Annotated[list[str] | None, _changes("the preset that --settings names", "passkey.samples=50")]
CampaignOverrides = Annotated[list[str] | None, _changes("the preset", "runner.parallel=4")]
RunPreset = Annotated[str, _preset("hope/demo")]
DataPreset = Annotated[str, _preset("data/demo")]
CampaignPreset = Annotated[str, _preset("campaign/demo")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder (newest checkpoint) or checkpoint.")
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", metavar="RUN_OR_CHECKPOINT", help="Run folder or checkpoint.")
]
TextFiles = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Text, JSON lines or Parquet; - for standard input.")
]
TextField = Annotated[str, typer.Option(help="Field of JSON lines and Parquet rows that holds the text.")]
MaxDocument = Annotated[int, typer.Option(min=1, help="Refuse a longer text.")]


class Device(StrEnum):
    """Where a trained model computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def print_error(error: NestedLMError) -> None:
    """Print an error once, on stderr: coloured on a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((type(error).__name__, "bold red"), ": ", str(error))
    Console(stderr=True).print(text, soft_wrap=True)


def reports_errors(verb: F) -> F:
    """Give a verb its exit codes: 2 for what a user can mend, 130 for Ctrl-C, 128 + n for signal n."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except NestedLMError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run  # type: ignore[return-value]


def require_device(device: Device) -> None:
    """Refuse a GPU where there is none.

    Raises:
        ConfigError: with the repair.
    """
    from nested_lm.reading.trained import choose_device

    choose_device(device.value)


def open_checkpoint(source: Path, device: Device) -> "LoadedCheckpoint":
    """Load the model that a verb names, on the device it asks for."""
    from nested_lm.checkpoint import find_checkpoint, load_model
    from nested_lm.reading.trained import choose_device

    chosen = choose_device(device.value)
    return load_model(find_checkpoint(source, report=functools.partial(typer.echo, err=True)), device=chosen)
