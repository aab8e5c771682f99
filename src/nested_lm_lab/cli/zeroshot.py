"""The verbs of `nested-lm eval` for the zero-shot tasks of the LM Evaluation Harness."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from nested_lm.cli.arguments import Checkpoint, Device, open_checkpoint, reports_errors

Tasks = Annotated[str, typer.Option(help="all, paper (the papers' columns), or names with commas between.")]


@reports_errors
def zeroshot(
    source: Checkpoint,
    tasks: Tasks = "all",
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that `eval zeroshot-data` made; the Hugging Face hub by default."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First documents of each task only.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens read of a document; the context of the training by default.")
    ] = None,
    memorize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="passes=N[,levels=A+B][,surprise=X]",
            help="Also score after reading each text into the memory first; repeat for more variants.",
        ),
    ] = None,
    no_bigram: Annotated[bool, typer.Option("--no-bigram", help="Leave out the floor of the training text.")] = False,
    batch_rows: Annotated[int, typer.Option(min=1, help="Texts read side by side.")] = 32,
    bootstrap_samples: Annotated[int, typer.Option(min=100, help="Resamples of the intervals.")] = 1000,
    label: Annotated[
        str | None, typer.Option(help="Tells the result from another of the same run, such as memorize.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Result file; eval/zeroshot_NAME[_LABEL].json by default.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """PIQA, HellaSwag, ARC and others through lm-eval's own task files, beside their floors and the papers' rows."""
    from nested_lm_lab.tasks.zeroshot.settings import ZeroShotSettings, parse_memorize
    from nested_lm_lab.tasks.zeroshot.tasks import choose_tasks

    settings = ZeroShotSettings(
        tasks=choose_tasks(tasks),
        limit=limit,
        max_length=max_length,
        memorize=tuple(parse_memorize(text) for text in memorize or ()),
        bigram_tokens=None if no_bigram else 16_000_000,
        batch_rows=batch_rows,
        bootstrap_samples=bootstrap_samples,
    )
    from nested_lm.checkpoint import find_checkpoint
    from nested_lm_lab.tasks.zeroshot.run import default_output, evaluate_zeroshot

    path = find_checkpoint(source, report=functools.partial(typer.echo, err=True))
    loaded = open_checkpoint(path, device)
    target = output or default_output(loaded.identity["name"], label)
    evaluate_zeroshot(loaded, path, settings, data_dir=data_dir, output=target, report=typer.echo, label=label)


@reports_errors
def zeroshot_data(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    tasks: Tasks = "all",
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="Folder with a JSON-lines, JSON or Parquet file a task; the hub by default."
        ),
    ] = None,
) -> None:
    """Make the folder that `eval zeroshot --data-dir` reads without a network."""
    from nested_lm_lab.tasks.zeroshot.data_folder import make_data_folder
    from nested_lm_lab.tasks.zeroshot.tasks import choose_tasks

    path = make_data_folder(output, choose_tasks(tasks), source=source, report=typer.echo)
    typer.echo(f"hashes in {path}")


@reports_errors
def zeroshot_compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Result file of `eval zeroshot`.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another, of the same documents and settings.")],
) -> None:
    """Differences of two results, paired by document: FIRST minus SECOND, with 95 % intervals."""
    from nested_lm_lab.evaluation.results import load_result
    from nested_lm_lab.tasks.zeroshot.compare import comparison_lines

    for line in comparison_lines(load_result(first), load_result(second)):
        typer.echo(line)
