"""Optimizers in presets: one for the matrices, one for each level, and what is refused."""

import pytest

from nested_lm.config.load import load_run, parse_run
from nested_lm.config.train import MatrixOptimizer
from nested_lm.config.update_rules import M3, DeltaGradientDescent, DeltaMomentum, GradientDescent
from nested_lm.errors import ConfigError

DEEP = "defaults:\n  - /hope/demo\n  - _self_\ntrain:\n  optimizer:\n    kind: deep\n"


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Write a preset of the user's own, and work beside it."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, start: str = DEEP) -> str:
        (tmp_path / "mine.yaml").write_text(start + body, encoding="utf-8")
        return "mine.yaml"

    return write


def mistake(preset: str, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(preset, overrides)
    return str(caught.value)


def test_a_rule_for_the_matrices(preset):
    run = load_run(preset("    rule: {kind: delta_momentum, erase: 0.4}\n"))
    assert run.train.optimizer.rule == DeltaMomentum(kind="delta_momentum", erase=0.4)
    assert parse_run(run.model_dump(mode="json"), "stored") == run


def test_an_optimizer_for_a_level():
    levels = len(load_run("hope/demo").model.channel.levels)
    entries = ["null"] * (levels - 1) + ["{rule: {kind: m3, slow_every: 8}, rate: 0.02, weight_decay: 0.0}"]
    run = load_run("hope/demo", [f"train.optimizer.levels=[{','.join(entries)}]"])
    own = MatrixOptimizer(rule=M3(kind="m3", slow_every=8), rate=0.02, weight_decay=0.0)
    assert run.train.optimizer.levels == (None,) * (levels - 1) + (own,)
    assert parse_run(run.model_dump(mode="json"), "stored") == run
    last = f"train.optimizer.levels.{levels - 1}.rate=0.5"
    changed = load_run("hope/demo", [f"train.optimizer.levels=[{','.join(entries)}]", last])
    assert changed.train.optimizer.levels[-1].rate == 0.5


def test_a_level_too_many_is_refused():
    levels = len(load_run("hope/demo").model.channel.levels)
    text = mistake("hope/demo", [f"train.optimizer.levels=[{','.join(['null'] * (levels + 1))}]"])
    assert f"train.optimizer.levels has {levels + 1} entries, the model's channel memory {levels} levels" in text


def test_gradient_descent_has_no_settings(preset):
    assert GradientDescent(kind="gd").settings == {}
    text = mistake(preset("    rule: {kind: gd, inertia: 0.9}\n"))
    assert "train.optimizer.rule.inertia" in text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{kind: delta_momentum, inertia: 0.5}", "erase 0.9 is above inertia 0.5"),
        ("{kind: dmgd, memory_rate: 2.0}", "the memory stays bounded up to 1.0"),
        ("{kind: dmgd, objective: dot}", "objective=dot and inertia=0.9 the memory stays bounded up to 0.1"),
        ("{kind: dmgd, hidden: 2}", "a whole number >= 4"),
        ("{kind: muon, iterations: 50}", "<= 20"),
        ("{kind: m3, beta1: 1.0}", "< 1"),
        ("{kind: lion}", "choose one of gd, momentum"),
        ("{kind: dgd}", "rule dgd needs to know what each layer read, and the optimizer of a run sees gradients only"),
    ],
)
def test_settings_that_do_not_work_are_refused(preset, rule, message):
    assert message in mistake(preset(f"    rule: {rule}\n"))


def test_dgd_is_for_levels_that_write_in_context():
    where = "model.channel.levels.0.in_context.rule"
    run = load_run("hope/demo_in_context", [f"{where}={{kind: dgd, erase: whole}}"])
    assert run.model.channel.writes[0].rule == DeltaGradientDescent(kind="dgd", erase="whole")
    assert parse_run(run.model_dump(mode="json"), "stored") == run
    text = mistake("hope/demo", ["train.optimizer.levels=[null,{rule: {kind: dgd}, rate: 0.1},null]"])
    assert "model.channel.levels[].in_context.rule" in text
    assert "choose another rule, such as delta_momentum" in text
