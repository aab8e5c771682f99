"""The `nested-lm` command: reads arguments, calls one stage, prints errors without a traceback.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

import functools
import io
import json
import sys
from contextlib import nullcontext
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nested_lm import __version__
from nested_lm.cli.arguments import (
    Checkpoint,
    CheckpointOption,
    DataOverrides,
    DataPreset,
    Device,
    MaxDocument,
    Overrides,
    RunPreset,
    TextField,
    TextFiles,
    open_checkpoint,
    reports_errors,
)
from nested_lm.cli.threads import spin_shortly
from nested_lm.errors import ConfigError

if TYPE_CHECKING:
    from nested_lm.config.run import RunConfig

app = typer.Typer(
    name="nested-lm",
    help="Hope: language models whose weights go on learning while they read. Train, evaluate and compare.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # local values may hold keys
    context_settings={"help_option_names": ["-h", "--help"]},
)

spin_shortly()  # before anything imports torch

VERBS = "nested_lm.verbs"
"""Entry points of packages that add verbs to the command: functions that take the typer application."""


class Resume(StrEnum):
    """What `train` does with a run folder that holds checkpoints."""

    auto = "auto"
    never = "never"


def main() -> None:
    """Run the command line. What a console cannot show is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nested-lm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hope: language models whose weights go on learning while they read. Train, evaluate and compare."""


@app.command()
@reports_errors
def presets(
    folder: Annotated[str | None, typer.Argument(metavar="[FOLDER]", help="Only these, such as baselines.")] = None,
) -> None:
    """List the presets that come with the package, and what each is."""
    from nested_lm.config.compose import preset_titles

    titles = preset_titles(folder)
    width = max(map(len, titles))
    for name, title in titles.items():
        typer.echo(f"{name:<{width}}  {title}")


@app.command()
@reports_errors
def explain(
    field: Annotated[str, typer.Argument(metavar="FIELD", help="Dotted, as train.schedule or campaign.runner.")],
) -> None:
    """Say what a setting means, what it may hold, and what stands below it."""
    from nested_lm.config.meanings import explain_field

    for line in explain_field(field):
        typer.echo(line)


@app.command()
@reports_errors
def data(preset: DataPreset, overrides: DataOverrides = None) -> None:
    """Build a data set: text to tokenizer, splits and token shards. Continues where it stopped."""
    from nested_lm.config.load import load_data
    from nested_lm.data.pipeline import build

    folder = build(load_data(preset, overrides or ()), report=typer.echo)
    typer.echo(f"data set in {folder}")


@app.command()
@reports_errors
def train(
    preset: RunPreset,
    overrides: Overrides = None,
    resume: Annotated[
        Resume, typer.Option(help="auto: go on from the newest checkpoint. never: refuse a used folder.")
    ] = Resume.auto,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Sweep: one run for each combination, as in seed=1,2.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained; train nothing.")] = False,
    mfu: Annotated[float, typer.Option(help="Model FLOP utilisation that --dry-run assumes for hours.")] = 0.3,
    devices: Annotated[int, typer.Option(min=1, help="Devices that --dry-run assumes.")] = 1,
    device_name: Annotated[
        str | None, typer.Option(help="Device whose memory and hours --dry-run states: h100, h200, a100.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Start from its weights; a run folder means its newest checkpoint."),
    ] = None,
) -> None:
    """Train a run, or go on with it."""
    from nested_lm.config.compose import quoted
    from nested_lm.config.load import load_run

    if init_from is not None:
        overrides = [*(overrides or ()), f"train.init_from={quoted(str(init_from))}"]

    if multirun and dry_run:
        raise ConfigError("--dry-run describes one run; leave -m and the lists of values out, or --dry-run")
    if multirun:
        from nested_lm.config.sweep import run_sweep

        run_sweep(preset, overrides or (), functools.partial(train_job, resume=resume.value))
        return
    config = load_run(preset, overrides or ())
    if dry_run:
        from nested_lm.train.costs.count import describe_costs

        *lines, last = describe_run(config)
        costs = describe_costs(config, device=device_name, mfu=mfu, devices=devices)
        for line in [*lines, *(f"{label:<12} {text}" for label, text in costs), last]:
            typer.echo(line)
        return
    _train(config, resume.value)


def train_job(config: "RunConfig", *, resume: str) -> None:
    """Train one run of a sweep; importable, so that Hydra's launchers can send it to other processes."""
    typer.echo(f"run in {config.output_dir}")
    _train(config, resume)


def _train(config: "RunConfig", resume: str) -> None:
    from nested_lm.train.trainer import train as train_run

    summary = train_run(config, resume=resume)  # type: ignore[arg-type]  # one of its two literals
    if summary.exit_code:
        sys.exit(summary.exit_code)  # SystemExit also ends the sweep the run is part of


def describe_run(config: "RunConfig") -> list[str]:
    """Say in a few lines what a run is: parameters by part, steps, tokens, schedule."""
    from nested_lm.config.load import training_hash
    from nested_lm.nn.sizing import count_parameters

    plan = config.train
    parts = count_parameters(config.model)
    total = parts.pop("total")
    schedule = plan.schedule
    stages = [f"warm-up {schedule.warmup_tokens:,}"]
    if schedule.kind == "wsd":
        constant = plan.budget_tokens - schedule.warmup_tokens - schedule.decay_tokens
        stages += [f"constant {constant:,}", f"decay {schedule.decay_tokens:,}"]
    else:
        stages.append(f"half a cosine {plan.budget_tokens - schedule.warmup_tokens:,}")
    rates = {key: value for key, value in plan.optimizer if key.endswith("rate")}
    rows = {
        "run": f"{config.name}, seed {config.seed}, configuration {training_hash(config)}",
        "folder": config.output_dir,
        "data": f"{config.data.name} in {config.data.output_dir}",
        "model": f"width {config.model.width}, {config.model.num_layers} layers, "
        f"{config.model.mixer.kind} + {config.model.channel.kind}",
        "parameters": f"{total:,}: " + ", ".join(f"{part} {count:,}" for part, count in parts.items()),
        "weights": "drawn with the seed" if plan.init_from is None else f"those of {plan.init_from}",
        "budget": f"{plan.budget_tokens:,} tokens = {plan.num_steps:,} steps of {plan.step_tokens:,} "
        f"(context {plan.context_length} x batch {plan.batch_size} x accumulation {plan.accumulation})",
        "stream": ", ".join([plan.stream.kind, *(f"{key} {value}" for key, value in plan.stream if key != "kind")]),
        "optimizer": f"{plan.optimizer.kind}, " + ", ".join(f"{key} {value:g}" for key, value in rates.items()),
        "schedule": f"{schedule.kind}, in tokens: {', '.join(stages)}, to {schedule.final:g} of the peak",
        "precision": f"{plan.precision}, float32 products {plan.matmul_precision}, device {plan.device}",
        "validation": f"every {plan.evaluate_every_tokens:,} tokens, on {plan.evaluate_tokens:,}",
        "checkpoints": f"every {plan.checkpoints.every_tokens:,} tokens, newest {plan.checkpoints.keep} kept",
    }
    return [f"{label:<12} {text}" for label, text in rows.items()] + ["dry run: nothing was trained or written"]


@app.command()
@reports_errors
def generate(
    source: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty for the start of a document.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the most likely tokens up to it.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Keep so many likely tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed writes the same text.")] = 1,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from what `memorize` read; the file is not changed.")
    ] = None,
    update_memory: Annotated[
        bool, typer.Option("--update-memory", help="Store prompt and new text in the --memory file as well.")
    ] = False,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """Continue a text with a trained model."""
    if top_p == 0.0:
        raise ConfigError("--top-p 0 keeps no token; choose a value above 0, up to 1 (which keeps all)")
    if update_memory and memory is None:
        raise ConfigError("--update-memory needs a file to update; name it with --memory")
    from nested_lm.reading.trained import TrainedModel
    from nested_lm.storage.lock import own_file

    writes = memory is not None and update_memory
    with own_file(memory, activity="generate --update-memory") if writes else nullcontext():
        trained = TrainedModel.of(open_checkpoint(source, device))
        if memory is not None:
            trained.load_memory(memory)
        text = trained.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            remember=update_memory,
        )
        typer.echo(prompt + text)
        if writes:
            trained.save_memory(memory)


@app.command()
@reports_errors
def memorize(
    files: TextFiles,
    checkpoint: CheckpointOption,
    memory: Annotated[Path, typer.Option(metavar="FILE", help="Memory file to write.")],
    go_on: Annotated[bool, typer.Option("--continue", help="Read on from the memory that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the memory that is there.")] = False,
    text_field: TextField = "text",
    max_document_mib: MaxDocument = 64,
    max_state_mib: Annotated[int, typer.Option(min=1, help="Refuse a state that takes more memory.")] = 1024,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """Read documents into a memory file that `generate` and `score` can use. Until the end nothing is changed."""
    if go_on and overwrite:
        raise ConfigError("--continue keeps what the memory holds, --overwrite drops it; give one of them")
    from nested_lm.reading import verbs
    from nested_lm.storage.lock import own_file

    mode: Literal["new", "continue", "overwrite"] = "continue" if go_on else "overwrite" if overwrite else "new"
    verbs.check_memorize(memory, files, mode)
    texts = verbs.Texts(files, text_field, max_document_mib * verbs.MIB)
    trained = verbs.TrainedModel.of(open_checkpoint(checkpoint, device))
    with own_file(memory, activity="memorize"):
        done = verbs.memorize(trained, texts, memory, mode=mode, max_state_bytes=max_state_mib * verbs.MIB)
    for line in verbs.describe_memorized(done, trained, memory):
        typer.echo(line)


@app.command()
@reports_errors
def score(
    files: TextFiles,
    checkpoint: CheckpointOption,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also score with this memory; the file is not changed.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the nats of every token here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents read side by side.")] = 8,
    text_field: TextField = "text",
    max_document_mib: MaxDocument = 64,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.auto,
) -> None:
    """Bits per byte of documents, each by itself: without a memory, and with it."""
    from nested_lm.reading import verbs

    verbs.check_files(files)
    texts = verbs.Texts(files, text_field, max_document_mib * verbs.MIB)
    trained = verbs.TrainedModel.of(open_checkpoint(checkpoint, device))
    scores = verbs.score(trained, texts, memory, batch_size=batch_size)
    for line in verbs.describe_scores(scores):
        typer.echo(line)
    if as_json is not None:
        verbs.write_scores(as_json, scores)
        typer.echo(f"nats of every token in {as_json}")


@app.command()
@reports_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder with a Hugging Face Llama checkpoint, or its name on the hub."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Run folder to write.")],
    overrides: Overrides = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Training tokens between two updates of each level, fastest first; 1, 4, 16 steps by default."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="Preset of the texts to train and evaluate on later.")] = "data/demo",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Turn a Llama checkpoint into Hope-Attention: the same model, its MLPs assigned to levels."""
    try:
        periods = None if levels is None else tuple(int(period) for period in levels.split(","))
    except ValueError:
        raise ConfigError(f"--levels {levels!r}: write tokens with commas between, as in 32768,131072") from None
    from nested_lm.conversion.convert import convert as convert_model

    made = convert_model(source, output, overrides or (), periods=periods, data=data, revision=revision)
    periods = made.config.model.channel.periods
    typer.echo(f"{made.parameters:,} parameters in {made.folder}")
    for level, period in enumerate(periods):
        layers = ", ".join(str(layer) for layer, found in enumerate(made.levels) if found == level)
        typer.echo(f"level {level}, updated every {period:,} training tokens: MLPs of layers {layers}")


@app.command()
@reports_errors
def doctor(
    output: Annotated[Path, typer.Option(help="Folder that runs would be written to.")] = Path("artifacts"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check this machine and installation; exit code 1 when something necessary is missing."""
    from nested_lm.cli.doctor import examine

    checks = examine(output)
    passed = all(check.state != "failed" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": passed, "checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        for check in checks:
            typer.echo(str(check))
    if not passed:
        raise typer.Exit(1)


for _point in entry_points(group=VERBS):
    _point.load()(app)
