"""The verbs of `nested-lm eval` that measure memory over long texts."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nested_lm.cli.arguments import Checkpoint, Device, open_checkpoint, reports_errors
from nested_lm.errors import ConfigError

if TYPE_CHECKING:
    from nested_lm.checkpoint import LoadedCheckpoint

Books = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to hide things in; repeat for more files. The shipped corpus by default."),
]
Lengths = Annotated[str, typer.Option(help="Tokens of a prompt, with commas between; 2k is 2,048.")]
Depths = Annotated[
    str, typer.Option(help="How many, evenly from 0 to 1 (1: the middle); or the depths, as 0.5 or 0,0.5,1.")
]
Samples = Annotated[
    int, typer.Option(min=1, help="Questions for each length; fewer than 23 show no length at RULER's 0.856.")
]
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
    samples: Samples = 24,
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
    label: Annotated[
        str | None, typer.Option(help="Keep the result beside the others, as niah_LABEL.json, such as long.")
    ] = None,
    output: Output = None,
    device: OnDevice = Device.auto,
) -> None:
    """Needle curves: RULER's tasks at exact lengths and depths, with controls. Lengths may go up to 512k and beyond."""
    from nested_lm_lab.tasks.needles.settings import parse_settings

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
    from nested_lm_lab.tasks.needles.run import default_output, evaluate_plan, plan_niah

    loaded, path = open_source(source, device)
    plan = plan_niah(loaded, settings, label=label)
    evaluate_plan(loaded, path, plan, output=output or default_output(source, path, plan.task), report=typer.echo)


@reports_errors
def babilong(
    source: Checkpoint,
    tasks: Annotated[str, typer.Option(help="qa1 to qa5, with commas between.")] = "qa1,qa2",
    facts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="bAbI's English files, such as qa1_test.txt; made here by default: qa1, qa2."),
    ] = None,
    lengths: Lengths = "2k,4k,8k,16k,32k",
    samples: Samples = 24,
    examples: Annotated[bool, typer.Option(help="Put two worked examples before the text.")] = True,
    books: Books = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for an answer.")] = 20,
    batch_rows: BatchRows = 48,
    max_state_mib: MaxState = 2048,
    output: Output = None,
    device: OnDevice = Device.auto,
) -> None:
    """Questions about facts hidden in books, after BABILong, with controls."""
    from nested_lm_lab.tasks.needles.babilong import parse_babilong, plan_babilong
    from nested_lm_lab.tasks.needles.run import default_output, evaluate_plan

    settings, names = parse_babilong(
        tasks=tasks,
        lengths=lengths,
        facts=facts,
        samples=samples,
        books=tuple(str(path) for path in books or ()),
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        max_state_mib=max_state_mib,
    )
    loaded, path = open_source(source, device)
    plan = plan_babilong(loaded, settings, names, facts=facts, examples=examples)
    target = output or default_output(source, path, "babilong")
    evaluate_plan(loaded, path, plan, output=target, report=typer.echo)


@reports_errors
def books(
    source: Checkpoint,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Books; the shipped corpus in stretches by default."),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens read of each book; 32k is 32,768.")] = "32k",
    count: Annotated[
        int | None, typer.Option(min=1, help="Stretches of the shipped corpus, 8 by default; not with files.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Books read side by side.")] = 8,
    max_state_mib: Annotated[int, typer.Option(min=1, help="Stop where their states take more MiB.")] = 2048,
    output: Output = None,
    device: OnDevice = Device.auto,
) -> None:
    """Loss and perplexity by position in long books: with carried state, and with a fresh one every context."""
    if files and count is not None:
        raise ConfigError("--count says how much of the shipped corpus is read; leave it out, or the files")
    from nested_lm_lab.tasks.books import evaluate_books
    from nested_lm_lab.tasks.needles.run import default_output
    from nested_lm_lab.tasks.needles.settings import parse_size

    tokens = parse_size(length, option="--length")
    loaded, path = open_source(source, device)
    evaluate_books(
        loaded,
        path,
        tuple(files or ()),
        length=tokens,
        count=count or 8,
        batch_rows=batch_rows,
        max_state_mib=max_state_mib,
        output=output or default_output(source, path, "books"),
        report=typer.echo,
    )
