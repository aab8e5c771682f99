"""Publishing what is published already changes nothing; other results reach every number of the README."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from nested_lm.errors import ReportError
from nested_lm_lab.evaluation.results import load_result

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("publish_demo", ROOT / "scripts" / "publish_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path):
    """A project whose demo left what is published in this one."""
    for run in (ROOT / "eval" / "demo").iterdir():
        folder = tmp_path / "artifacts" / "demo" / "runs" / run.name
        (folder / "results").mkdir(parents=True)
        for file in run.iterdir():
            is_result = file.suffix == ".json" and file.name != "run.json"
            shutil.copyfile(file, (folder / "results" if is_result else folder) / file.name)
    for name in ("artifacts/demo/figures/overview.svg", "docs/figures/demo.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "docs" / "figures" / "demo.svg", tmp_path / name)
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    return tmp_path


def words(path):
    return path.read_text(encoding="utf-8").split()


def test_publishing_again_changes_nothing(script, project):
    lines = script.publish(project)
    assert words(project / "README.md") == words(ROOT / "README.md")
    for file in (path for path in (ROOT / "eval" / "demo").rglob("*") if path.is_file()):
        assert (project / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert any(line.startswith("hope-demo: carrying the state on gains") for line in lines)


def test_other_results_are_written_into_the_readme(script, project):
    path = project / "artifacts" / "demo" / "runs" / "transformer-demo" / "results" / "language_modelling.json"
    found = load_result(path)
    text = script.rewrite(
        (ROOT / "README.md").read_text(encoding="utf-8"), {"hope-demo": found, "transformer-demo": found}
    )
    bits = found.metrics.window.bits_per_byte
    assert " ".join(text.split()).count(f"({bits.low:.3f} to {bits.high:.3f})") == 2
    assert f"Hope **{bits.value:.3f}**" in " ".join(text.split())


def test_a_readme_without_the_sentence_and_a_missing_result_are_refused(script, project):
    readme = project / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(ReportError, match="nothing is written like"):
        script.publish(project)
    assert not (project / "eval").exists()
