"""The verbs of `nested-lm eval` that measure memory over long texts."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nested_lm.cli_arguments import Checkpoint, Device, open_checkpoint, reports_errors

if TYPE_CHECKING:
    from nested_lm.checkpoint import LoadedCheckpoint

Books = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to hide things in; repeat for more files. The shipped corpus by default."),
]
Lengths = Annotated[str, typer.Option(help="Tokens of a prompt, with commas between; 2k is 2,048.")]
Depths = Annotated[str, typer.Option(help="How many, evenly from 0 to 1, or the depths with commas between.")]
Samples = Annotated[int, typer.Option(min=1, help="Questions for each length.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed asks the same questions.")]
BatchRows = Annotated[int, typer.Option(min=1, help="Prompts read side by side.")]
MaxState = Annotated[
    int,
    typer.Option(min=1, help="MiB for states read side by side; a length of which one takes more is left out."),
]
Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Result file; in the run's results by default.")]
OnDevice = Annotated[Device, typer.Option(help="auto: a GPU when there is one.")]


def open_source(source: Path, device: Device) -> tuple["LoadedCheckpoint", Path]:
    """The model that a run folder or checkpoint means, and the checkpoint's path."""
    from nested_lm.checkpoint import find_checkpoint

    path = find_checkpoint(source, report=functools.partial(typer.echo, err=True))
    return open_checkpoint(path, device), path


@reports_errors
def niah(
    source: Checkpoint,
    tasks: Annotated[
        str,
        typer.Option(help="s1 s2 s3 mk1 mk2 mk3 mv mq vt cwe fwe, commas between; niah: the first eight; all."),
    ] = "niah",
    lengths: Lengths = "2k,4k,8k,16k,32k",
    depths: Depths = "11",
    samples: Samples = 20,
    haystack: Annotated[
        str | None, typer.Option(help="noise, needle or books for all tasks; what each has in RULER by default.")
    ] = None,
    books: Books = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens generated for an answer; RULER's number by default.")
    ] = None,
    batch_rows: BatchRows = 48,
    max_state_mib: MaxState = 2048,
    output: Output = None,
    device: OnDevice = Device.auto,
) -> None:
    """Needle curves: RULER's tasks at exact lengths and depths, with controls. Lengths may go up to 512k and beyond."""
    from nested_lm.eval.niah.settings import parse_settings

    settings = parse_settings(
        tasks=tasks,
        lengths=lengths,
        depths=depths,
        samples=samples,
        haystack=haystack,
        books=tuple(str(path) for path in books or ()),
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        max_state_mib=max_state_mib,
    )
    from nested_lm.eval.niah.run import default_output, evaluate_plan, plan_niah

    loaded, path = open_source(source, device)
    target = output or default_output(source, path, "niah")
    evaluate_plan(loaded, path, plan_niah(loaded, settings), output=target, report=typer.echo)
