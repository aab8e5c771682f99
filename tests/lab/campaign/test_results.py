"""Which results an evaluation step is to leave, and which steps would write the same."""

from pathlib import Path

import pytest

from nested_lm.config.campaign import CampaignConfig
from nested_lm.config.load import load_campaign, load_run
from nested_lm.errors import ConfigError
from nested_lm_lab.campaign.plan import run_campaign
from nested_lm_lab.campaign.results import results_of_run
from nested_lm_lab.campaign.steps import plan_steps
from nested_lm_lab.evaluation.registry import continual_words, find_task
from tests.lab.campaign.fake_campaign import campaign

pytestmark = pytest.mark.usefixtures("prefix")  # presets are composed once


def with_evaluations(*evaluations: dict[str, object]) -> CampaignConfig:
    """The tiny campaign with these steps in place of Hope's evaluation."""
    steps = campaign().model_dump(mode="json")["steps"]
    ids = [f"eval-hope{number or ''}" for number in range(len(evaluations))]
    made = [{"kind": "eval", "id": id, "run": "hope", **given} for id, given in zip(ids, evaluations, strict=True)]
    return CampaignConfig.model_validate(
        campaign().model_dump(mode="json") | {"steps": [*steps[:3], *made, *steps[4:]]}
    )


@pytest.mark.parametrize(
    ("suite", "options", "added", "outputs"),
    [
        ("niah", ["--tasks=s1"], (), ["results/niah.json"]),
        ("niah", ["--label=short", "--label=long"], (), ["results/niah_long.json"]),
        (
            "zeroshot",
            ["--label=memorize"],
            ("--output=out/hope/results/zeroshot_memorize.json",),
            ["results/zeroshot_memorize.json"],
        ),
        ("babilong", ["--tasks=qa1"], (), ["results/babilong.json"]),
        ("books", ["--length=4k"], (), ["results/books.json"]),
        ("zeroshot", ["--tasks=piqa"], ("--output=out/hope/results/zeroshot.json",), ["results/zeroshot.json"]),
        ("zeroshot", ["--output=out/hope/results/piqa.json"], (), ["results/piqa.json"]),
        ("continual", ["--tasks=facts, regret"], (), ["results/changing_facts.json", "results/regret.json"]),
        ("continual", ["--tasks=stream", "--output-dir=out/hope/results"], (), ["results/continual.json"]),
    ],
)
def test_a_suite_leaves_its_result_where_the_report_looks(suite, options, added, outputs):
    step = plan_steps(with_evaluations({"suite": suite, "options": options}))[3]
    assert step.arguments == ("eval", suite, "out/hope", *options, *added)
    assert step.outputs == tuple(outputs)


def test_tasks_of_continual_are_files_that_the_suite_writes():
    known = continual_words()
    every = plan_steps(with_evaluations({"suite": "continual", "options": [f"--tasks={','.join(known)}"]}))[3]
    assert every.results == tuple(find_task(entry.kind).name for entry in known.values())


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("hope/demo", ("language_modelling", "passkey", "sampling")),
        ("hope/demo_chronological", ("continual",)),
    ],
)
def test_an_evaluation_leaves_a_result_for_each_task_that_it_is_asked_for(preset, names):
    run = load_run(preset)
    assert results_of_run(run.eval, run).names == names


@pytest.mark.parametrize(
    ("suite", "option", "allowed"),
    [
        ("zeroshot", "--output=/elsewhere/z.json", "a .json file directly in out/hope/results"),
        ("niah", "--output=out/hope/results/niah.txt", "a .json file directly in out/hope/results"),
        ("niah", "--output=out/hope/results/deep/niah.json", "a .json file directly in out/hope/results"),
        ("continual", "--output-dir=elsewhere", "out/hope/results"),
    ],
)
def test_a_place_where_the_report_does_not_look_is_refused(suite, option, allowed):
    message = f"(?s)step 'eval-hope': {option} is a place where the report does not look.*Allowed is {allowed}"
    with pytest.raises(ConfigError, match=message):
        plan_steps(with_evaluations({"suite": suite, "options": [option, "--tasks=facts"]}))


def test_tasks_of_continual_have_to_be_named():
    with pytest.raises(ConfigError, match=r"(?s)step 'eval-hope': suite continual without --tasks.*--tasks=facts"):
        plan_steps(with_evaluations({"suite": "continual"}))


@pytest.mark.parametrize(
    ("suite", "first", "second", "repair"),
    [
        ("niah", ["--lengths=512"], ["--lengths=64k"], "Add --label=... to the options of step 'eval-hope1'"),
        ("niah", ["--label=long"], ["--output=out/hope/results/niah_long.json"], "Add --label="),
        ("zeroshot", ["--limit=5"], ["--output=out/hope/results/other.json"], "Add --label="),
        ("babilong", ["--tasks=qa1"], ["--tasks=qa2"], "Add --label="),
        ("continual", ["--tasks=facts,languages"], ["--tasks=facts"], "measure it in one of the steps"),
        ("run", [], [], "measure it in one of the steps"),
    ],
)
def test_two_steps_that_write_one_result_are_refused(suite, first, second, repair):
    both = [{"suite": suite, "options": options} for options in (first, second)]
    with pytest.raises(ConfigError) as caught:
        plan_steps(with_evaluations(*both))
    assert "steps 'eval-hope' and 'eval-hope1' both write result" in str(caught.value)
    assert repair in str(caught.value)


def test_results_of_other_labels_tasks_or_suites_stand_side_by_side():
    steps = plan_steps(
        with_evaluations(
            {"suite": "niah"},
            {"suite": "niah", "options": ["--label=long"]},
            {"suite": "continual", "options": ["--tasks=facts"]},
            {"suite": "continual", "options": ["--tasks=languages"]},
            {},
        )
    )
    assert len(steps) == 10


@pytest.mark.parametrize("path", sorted(Path("configs/campaign").absolute().glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_campaign_with_all_its_steps_can_be_planned(path):
    unset = [name for name, value in load_campaign(str(path)).variables.items() if value is None]
    config = load_campaign(str(path), [f"variables.{name}=/there" for name in unset])
    assert config.left_out() == {}
    assert all(step.outputs for step in plan_steps(config))


def test_another_suites_result_does_not_stand_for_a_deleted_one(prefix, calls):
    config = with_evaluations({"suite": "continual", "options": ["--tasks=regret,lesion"]}, {})
    run_campaign(config, prefix=prefix)
    calls()
    Path("out/hope/results/regret.json").unlink()
    run_campaign(config, prefix=prefix)
    assert calls() == ["eval hope", "report out"]
    assert Path("out/hope/results/regret.json").exists()
