"""The verb of `nested-lm eval` that measures continual learning."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nested_lm.cli.arguments import Device, reports_errors
from nested_lm.errors import ConfigError

Sources = Annotated[
    list[Path], typer.Argument(metavar="RUN_OR_CHECKPOINT...", help="Run folders (newest checkpoint) or checkpoints.")
]


@reports_errors
def continual(
    sources: Sources,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="stream regret carried lesion events retention classes facts languages, commas between; "
            "all that the run and the options allow by default."
        ),
    ] = None,
    oracle: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run that read the same text mixed, for `regret`.")
    ] = None,
    class_data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with clinc150, banking77 and dbpedia14.")
    ] = None,
    class_sets: Annotated[str, typer.Option(help="Which of them, commas between.")] = "clinc150,banking77,dbpedia14",
    class_hash: Annotated[str | None, typer.Option(help="Accept a copy with this content hash.")] = None,
    shots: Annotated[str, typer.Option(help="Examples of a class, such as 5,20,all.")] = "5",
    random_orders: Annotated[int, typer.Option(min=0, help="Random orders of the classes beside their own.")] = 0,
    tests_per_class: Annotated[str, typer.Option(help="Questions of a class, or all.")] = "5",
    entities: Annotated[int, typer.Option(min=1, help="Entities of the world of changing facts.")] = 20,
    epochs: Annotated[int, typer.Option(min=2, help="How often that world is told.")] = 4,
    lesson_sentences: Annotated[int, typer.Option(min=1, help="Sentences that teach a language.")] = 64,
    test_sentences: Annotated[int, typer.Option(min=1, help="Sentences to translate.")] = 20,
    pieces: Annotated[
        str | None,
        typer.Option(help="Contexts scored of each held-out document, or all; as many as the run's own by default."),
    ] = None,
    set_back_to: Annotated[str, typer.Option(help="Border that lesions set a level back to.")] = "period-0",
    permutations: Annotated[int, typer.Option(min=100, help="Of the permutation tests.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same questions and permutations.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents or questions read side by side.")] = 8,
    max_state_mib: Annotated[int, typer.Option(min=1, help="Refuse a stream whose state takes more memory.")] = 1024,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results go; the run's results by default.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also put the runs side by side, as a clock sweep.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """Continual learning: forgetting, regret, lesions, ticks of the levels; classes, facts and languages by reading."""
    names = None if tasks is None else _names(tasks, "--tasks")
    if compare is not None and len(sources) < 2:
        raise ConfigError("--compare puts runs side by side; name two or more")
    from pydantic import ValidationError

    from nested_lm_lab.tasks.continual.settings import ContinualSettings

    given: dict[str, Any] = {
        "class_sets": _names(class_sets, "--class-sets"),
        "class_hash": class_hash,
        "shots": tuple(_count(word, "--shots") for word in _names(shots, "--shots")),
        "random_orders": random_orders,
        "tests_per_class": _count(tests_per_class, "--tests-per-class"),
        "entities": entities,
        "epochs": epochs,
        "lesson_sentences": lesson_sentences,
        "test_sentences": test_sentences,
        "set_back_to": set_back_to,
        "permutations": permutations,
        "seed": seed,
        "batch_size": batch_size,
        "max_state_mib": max_state_mib,
    }
    if pieces is not None:
        given["pieces_per_document"] = _count(pieces, "--pieces")
    try:
        settings = ContinualSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg']} (found {first['input']!r})") from error
    import torch

    from nested_lm_lab.tasks.continual.comparison import compare_runs
    from nested_lm_lab.tasks.continual.run import evaluate_continual

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu, or see `nested-lm doctor`")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value
    evaluate_continual(
        sources,
        tasks=names,
        settings=settings,
        oracle=oracle,
        class_data=class_data,
        output_dir=output_dir,
        device=torch.device(chosen),
        report=typer.echo,
    )
    if compare is not None:
        compare_runs(sources, compare, settings=settings, report=typer.echo)


def _names(text: str, option: str) -> tuple[str, ...]:
    """Words between commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise ConfigError(f"{option} {text!r} names nothing; write names with commas between, or leave it out")
    return found


def _count(text: str, option: str) -> int | None:
    """A number of at least one; None for `all`."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{option}: {text!r} is neither a number of at least 1 nor `all`")
    return int(text)
