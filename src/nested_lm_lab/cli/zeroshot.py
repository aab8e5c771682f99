"""The verbs of `nested-lm eval` for the documents and results of the zero-shot tasks."""

from pathlib import Path
from typing import Annotated

import typer

from nested_lm.cli.arguments import reports_errors

Tasks = Annotated[str, typer.Option(help="all, paper (the papers' columns), or names with commas between.")]


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
