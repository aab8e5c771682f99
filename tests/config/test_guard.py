"""A preset is data: what names code or is enormous is refused before anything composes it, in one message."""

import pytest

from nested_lm.config.load import load_run
from nested_lm.errors import ConfigError

BASE = "defaults:\n  - /hope/demo\n  - _self_\n"
TWICE = "".join(f"x{index}: ${{x{index + 1}}}${{x{index + 1}}}\n" for index in range(40)) + "x40: ab\n"
ALIASES = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{index}: &a{index} [{', '.join([f'*a{index - 1}'] * 8)}]\n" for index in range(1, 8)
)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The message with which a preset of the user's own is refused."""
    monkeypatch.chdir(tmp_path)

    def load(body, overrides=(), base=BASE):
        (tmp_path / "mine.yaml").write_text(base + body, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_run("mine.yaml", overrides)
        return str(caught.value)

    return load


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("hydra: {searchpath: ['pkg://this']}\n", "hydra.searchpath  (mine.yaml:4)"),
        ("hydra: {searchpath: ['${oc.env:HOME}']}\n", "hydra.searchpath  (mine.yaml:4)"),
        ("hydra: {callbacks: {x: {_target_: hubconf.X}}}\n", "hydra.callbacks  (mine.yaml:4)"),
        ("hydra: 3\n", "a setting of Hydra"),
        ("hydra/job_logging: x\n", "a setting of Hydra"),
        ("model: {_target_: os.system}\n", "`_target_`, which names code"),
        ("seed: !!python/object/apply:os.system [ls]\n", "has the tag"),
        ("seed: !!int 3\n", "has the tag"),
        ("x: &x {seed: 3}\n<<: *x\n", "the merge key `<<`"),
        ("1: 2\n", "a key that is no name: 1"),
        ("? [1, 2]\n: 3\n", "a key that is no name"),
        ("null: 2\n", "a key that is no name: null"),
        (ALIASES, "aliases that stand for"),
        ("a: &a [*a]\n", "aliases that contain themselves"),
        ("seed: " + "[" * 900 + "]" * 900 + "\n", "nested more than 32 deep"),
        ("seed: " + "${" * 400 + "}" * 400 + "\n", "cannot be used"),
        ("seed: ${${name}}\n", "`${` inside `${...}`"),
        ("seed: ${oc.decode:3}\n", "the resolver `oc.decode`"),
        ("name: ${output_dir}\n", "refer to themselves"),
        ("eval: {sampling: '${eval}'}\n", "refer to themselves"),
        (TWICE, "stand for more than"),
        ("x: [" + "1, " * 30_000 + "1]\n", "beyond the 20,000 values"),
        ("# " + "x" * 2**20 + "\n", "a preset has at most"),
        ("model: {num_layers: 50000000}\n", "<= 1024"),
        ("model: {width: 1000000000000}\n", "<= 1048576"),
        ("model: {vocab_size: 1000000000000}\n", "<= 16777216"),
    ],
)
def test_is_refused(refused, body, reason):
    assert reason in refused(body)


def test_group_files_are_judged_as_well(refused, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/evil.yaml").write_text("x: {_target_: os.system}\n", encoding="utf-8")
    base = "defaults:\n  - /hope/demo\n  - sub: evil\n  - _self_\n"
    assert "sub/evil.yaml:1" in refused("", base=base)
    (tmp_path / "sub/good.yaml").write_text("{}\n", encoding="utf-8")
    assert "sub/evil.yaml:1" in refused("", ["sub=evil"], base=base.replace("evil", "good"))


@pytest.mark.parametrize("override", ["seed=" + "[" * 900 + "]" * 900, "name=" + "x" * 20_000])
def test_overrides_have_limits(refused, override):
    assert "command line override" in refused("", [override])


def test_aliases_of_a_reasonable_size_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = "eval: {sampling: {prompts: [&p 'Fellow-citizens', *p]}}\n"
    (tmp_path / "mine.yaml").write_text(BASE + body, encoding="utf-8")
    assert load_run("mine.yaml").eval.sampling.prompts == ("Fellow-citizens",) * 2
