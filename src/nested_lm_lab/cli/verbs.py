"""The laboratory's verbs of the `nested-lm` command: audit, eval, campaign and report."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from nested_lm.cli.arguments import CampaignOverrides, CampaignPreset, Device, Overrides, reports_errors
from nested_lm.errors import ConfigError
from nested_lm_lab.cli.evaluation import evaluation


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs; the entry point that `nested_lm.cli` looks for."""
    app.add_typer(evaluation, name="eval")
    for verb in (audit, campaign, report):
        app.command()(verb)


@reports_errors
def audit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PRESET_OR_RUN_OR_CHECKPOINT",
            help="Preset (fresh weights), run folder (newest checkpoint) or checkpoint.",
        ),
    ],
    overrides: Overrides = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure here.")
    ] = None,
    checks: Annotated[str | None, typer.Option(help="Comma-separated checks; all by default.")] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU when there is one.")] = Device.cpu,
) -> None:
    """Check that a model is what its equations say: figures against limits; exit code 1 when one is missed."""
    from nested_lm.train.strategies.base import choose_device
    from nested_lm_lab.audit.report import write_audit
    from nested_lm_lab.audit.runner import choose_checks, describe, run_audit, show
    from nested_lm_lab.audit.subject import open_subject

    names = choose_checks(checks)
    subject = open_subject(source, overrides or (), device=choose_device(device.value))
    for line in describe(subject):
        typer.echo(line)
    found = run_audit(subject, names, report=functools.partial(typer.echo, err=True))
    show(found)
    if as_json is not None:
        write_audit(as_json, found)
        typer.echo(f"figures in {as_json}")
    if not found.passed:
        raise typer.Exit(1)


@reports_errors
def campaign(
    preset: CampaignPreset,
    overrides: CampaignOverrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the steps and their commands; run none.")] = False,
) -> None:
    """Run data, trainings, evaluations and the report. Started again, it continues."""
    from nested_lm.config.load import load_campaign
    from nested_lm_lab.campaign.plan import run_campaign

    run_campaign(load_campaign(preset, overrides or ()), dry_run=dry_run)


@reports_errors
def report(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Folder of a campaign or a run; all published campaigns by default."),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also keep the campaign's evidence in eval/NAME, for version control.")
    ] = False,
    root: Annotated[Path, typer.Option(help="The project's folder, which holds eval/, docs/ and reports/.")] = Path(),
) -> None:
    """Render a campaign's report, print a run's results, or, without a folder, write the project's documents."""
    if folder is None:
        if publish:
            raise ConfigError("--publish keeps the evidence of one campaign; name its folder")
        from nested_lm_lab.report.project import Folders, write_project

        for path in write_project(Folders(root)):
            typer.echo(f"wrote {path}")
        return
    if (folder / "run.json").exists():
        if publish:
            raise ConfigError(f"--publish keeps the evidence of a campaign; {folder} is a run")
        from nested_lm_lab.report.run import run_lines

        for line in run_lines(folder):
            typer.echo(line)
        return
    from nested_lm.storage.lock import own_file
    from nested_lm_lab.report.render import render_campaign

    with own_file(folder / "report.html", activity="report"):
        typer.echo(f"report in {render_campaign(folder)}")
    if publish:
        from nested_lm_lab.report.evidence import publish as keep
        from nested_lm_lab.report.manifest import read_manifest

        typer.echo(f"evidence in {keep(folder, root / 'eval' / read_manifest(folder).name)}")
