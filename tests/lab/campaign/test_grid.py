"""Every variant of the shipped grids changes one factor and keeps the size; a grid that does not is refused."""

from functools import cache

import pytest

from nested_lm.config.ablation import AblationConfig
from nested_lm.config.load import load_ablation, load_run
from nested_lm.errors import ConfigError
from nested_lm_lab.campaign.grid import Arm, changed_fields, plan_arms

GRIDS = ("ablations/phase2", "ablations/phase2_nano")
TABLE_6 = {  # arXiv 2512.24695
    "w/o DGD",
    "w/o momentum",
    "w/o weight decay",
    "w/o CMS",
    "w/o inner projection k",
    "w/o inner projection v",
    "w/o inner projection q",
}
FACTORS = {  # of the plan's second phase; the base of a grid may itself be one of the choices
    "self-modification": {"memory-only"},
    "CMS depth": {"cms-1", "cms-3", "cms-5"},
    "optimizer of the levels": {"opt-gd", "opt-momentum", "opt-delta-momentum", "opt-dmgd", "opt-m3"},
    "mixer": {"attention-full", "attention-window", "delta-net"},
}
WIDTHS = ("model.channel.levels[", "model.mixer.head_width", "model.mixer.expansion")


@cache
def arms_of(name: str) -> tuple[Arm, ...]:
    return plan_arms(load_ablation(name))


@pytest.mark.parametrize("name", GRIDS)
class TestShippedGrids:
    def test_each_variant_changes_its_factor_and_widths_it_names(self, name):
        arms = {arm.name: arm for arm in arms_of(name)}
        for arm in list(arms.values())[1:]:
            changed = changed_fields(arms[arm.variant.against or "base"].config, arm.config)
            factor = [path for path in changed if path.startswith(arm.variant.fields)]
            assert factor, arm.name
            others = set(changed) - set(factor)
            assert all(path.startswith(WIDTHS) and path.endswith("expansion") for path in others), arm.name
            assert len(others) in (0, len(arm.variant.balance)), arm.name
            assert len({field.rsplit(".", 1)[0] for field in arm.variant.fields}) == 1  # one place of the tree

    def test_each_variant_has_the_size_of_the_base(self, name):
        base, *variants = arms_of(name)
        assert all(abs(arm.parameters / base.parameters - 1) < 0.01 for arm in variants)

    def test_no_two_arms_are_the_same_run(self, name):
        settings = [arm.config.model_copy(update={"name": "x"}).model_dump_json() for arm in arms_of(name)]
        assert len(set(settings)) == len(settings)

    def test_the_plan_and_table_6_are_covered(self, name):
        found: dict[str, set[str]] = {}
        for arm in arms_of(name)[1:]:
            found.setdefault(arm.variant.factor, set()).add(arm.name)
        for factor, names in FACTORS.items():
            assert names <= found[factor]
        rows = [arm.variant.paper.row for arm in arms_of(name)[1:] if arm.variant.paper]
        assert sorted(rows) == sorted(TABLE_6)

    def test_cms_depth_is_what_the_name_says(self, name):
        levels = {arm.name: arm.config.model.channel.levels for arm in arms_of(name) if arm.name.startswith("cms-")}
        assert {name: len(found) for name, found in levels.items()} == {"cms-1": 1, "cms-3": 3, "cms-5": 5}

    def test_every_level_gets_the_optimizer_of_the_name(self, name):
        kinds = {"opt-gd": "gd", "opt-momentum": "momentum", "opt-delta-momentum": "delta_momentum"}
        kinds |= {"opt-dmgd": "dmgd", "opt-muon": "muon", "opt-m3": "m3", "opt-adam": "adam"}
        for arm in arms_of(name):
            if arm.name.startswith("opt-"):
                assert {entry.rule.kind for entry in arm.config.train.optimizer.levels} == {kinds[arm.name]}


def test_only_keeps_the_order_of_the_grid_and_the_base():
    grid = load_ablation("ablations/phase2_nano")
    arms = plan_arms(grid, shared=["seed=7"], only=["no-dgd", "no-k", "slow-writes"])
    assert [arm.name for arm in arms] == ["base", "no-k", "slow-writes", "no-dgd"]
    assert {arm.config.seed for arm in arms} == {7}
    rates = "model.mixer.rates={memory: 0.05, generators: 0.05}"
    assert arms[3].overrides == ("seed=7", rates, "model.mixer.erase=none")  # on top of the arm it is compared with
    with pytest.raises(ConfigError, match="'no-dgd' is compared with 'slow-writes'; take that one into `only`"):
        plan_arms(grid, only=["no-dgd"])
    with pytest.raises(ConfigError, match="no variant 'nok'; choose from memory-only, no-k"):
        plan_arms(grid, only=["nok"])


def grid(**variant) -> AblationConfig:
    settings = {"factor": "f", "change": "c", "delta": ["model.mixer.erase=input"], "fields": ["model.mixer.erase"]}
    variants = {"one": {**settings, **variant}}
    return AblationConfig.model_validate({"title": "t", "base": "hope/demo", "variants": variants})


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            {
                "delta": ["model.mixer.erase=input", "train.clip_norm=2.0"],
                "fields": ["model.mixer.erase", "model.mixer.erase_since"],
            },
            r"'one' changes train\.clip_norm besides model\.mixer\.erase, .*two possible causes",
        ),
        ({"delta": ["seed=2"]}, r"'one' changes seed besides"),
        ({"delta": ["model.mixer.erase=both"]}, r"'one' changes none of model\.mixer\.erase: it is base again"),
        (
            {"delta": ["model.mixer.adapt=[memory]"], "fields": ["model.mixer.adapt"]},
            r"'one' has 935,160 parameters, base 1,034,232: -9\.6%, more than 2%",
        ),
        ({"delta": ["model.mixer.erase=nothing"]}, r"variant 'one' of hope/demo: .*one of both, input, none"),
    ],
)
def test_a_delta_that_is_not_one_factor_is_refused(variant, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        plan_arms(grid(**variant))


def test_a_balance_may_set_widths_only():
    with pytest.raises(ValueError, match=r"balance 'train\.clip_norm=2' is not a width"):
        grid(balance=["train.clip_norm=2"])


def test_a_grid_needs_variants_and_keeps_the_name_of_the_base():
    one = grid().variants["one"]
    with pytest.raises(ValueError, match="cannot be called `base`"):
        AblationConfig(title="t", base="hope/demo", variants={"base": one})
    with pytest.raises(ValueError, match="no variant is left"):
        AblationConfig(title="t", base="hope/demo", variants={"one": None})


def test_a_variant_is_compared_with_one_before_it():
    one = grid().variants["one"]
    with pytest.raises(ValueError, match=r"'one' is compared with 'two', which is no variant before it; .*\(none\)"):
        AblationConfig(title="t", base="hope/demo", variants={"one": one.model_copy(update={"against": "two"})})


def test_a_grid_is_not_a_run():
    with pytest.raises(ConfigError, match=r"an ablation grid, not a run(?s:.*)a step of kind grid"):
        load_run("ablations/phase2")
