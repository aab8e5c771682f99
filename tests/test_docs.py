"""The documentation is true where a machine can tell: links, names of code and tests, paths, examples, output."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm.config.load import load_data, load_run
from nested_lm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
INDEX = DOCS / "index.md"
EQUATIONS = DOCS / "equations.md"
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

CODE = re.compile(r"`((?:tests/)?[\w/]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(?:src|tests|configs|docs|\.github|\.ci)/[\w./-]*")


def prose(page):
    """Text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """Code blocks of a page in one language; an empty string for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [content for named, content in found if named == language]


def linked(page):
    targets = [target.partition("#")[0] for target in LINK.findall(prose(page)) if "://" not in target]
    return [(page.parent / target).resolve() for target in targets if target]


def test_names_in(path):
    """Test functions and methods of a test file, methods with their class."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


test_names_in.__test__ = False


def missing_name(file, name):
    """What is wrong with a reference `file:name`; None when it resolves."""
    packages = [name for name in ("nested_lm", "nested_lm_lab") if (ROOT / "src" / name / file).is_file()]
    path = ROOT / file if file.startswith("tests/") else ROOT / "src" / (packages or ["nested_lm"])[0] / file
    if not path.is_file():
        return f"{file}: no such file"
    if not name:
        return None
    if file.startswith("tests/"):
        return None if name in test_names_in(path) else f"{file}: no test {name}"
    found = importlib.import_module(f"{packages[0]}." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        if not hasattr(found, part):
            return f"{file}: no {name}"
        found = getattr(found, part)
    return None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert [str(target) for target in linked(page) if not target.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_and_tests_that_are_named_exist(page):
    problems = [missing_name(file, name) for file, name in CODE.findall(prose(page))]
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_of_the_repository_exist(page):
    spans = re.findall(r"`([^`]+)`", prose(page))
    named = {path for span in spans for path in span.split() if REPOSITORY_PATH.fullmatch(path)}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_a_wrong_reference_is_noticed():
    assert missing_name("ops/memory/chunk.py", "no_such_function")
    assert missing_name("ops/no_such_file.py", "")
    assert missing_name("tests/optim/test_level_clock.py", "test_that_is_not_there")
    assert missing_name("ops/memory/chunk.py", "solve_writes") is None


def test_every_equation_names_code_and_a_test():
    rows = [line.split("|") for line in prose(EQUATIONS).splitlines() if re.match(r"\| (\d|Titans)", line)]
    assert len(rows) > 8
    for row in rows:
        assert any(not file.startswith("tests/") and name for file, name in CODE.findall(row[2])), row[1]
        assert any(file.startswith("tests/") and name for file, name in CODE.findall(row[3])), row[1]


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [INDEX]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target in linked(page) if target.suffix == ".md" and target.is_relative_to(DOCS)]
    assert sorted(set(PAGES) - reached) == []


def test_decisions_are_numbered_without_gaps():
    numbers = [int(page.name[:4]) for page in sorted((DOCS / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_pasted_error_is_what_the_program_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    pasted = next(block for block in blocks(DOCS / "configuration.md", "") if "ConfigError:" in block)
    command, _, message = pasted.partition("\n")
    overrides = command.split("hope/demo ")[1].split()
    overrides.remove("--dry-run")
    with pytest.raises(ConfigError) as error:
        load_run("hope/demo", overrides)
    assert f"ConfigError: {error.value}".strip() == message.strip()


# The example of streaming.md needs a checkpoint: tests/cli/test_memory_commands.py has one. That
# of extending.md needs a new process, `tests/ops` runs it in one.
NOT_HERE = {"streaming.md", "extending.md"}
RUNNABLE = [page for page in [ROOT / "README.md", *PAGES] if blocks(page, "python") and page.name not in NOT_HERE]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
@pytest.mark.filterwarnings("default")  # torch.compile and vmap warn of what torch itself does
def test_python_examples_run(page):
    """Those of a page one after the other, as a reader would."""
    names = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_presets_of_the_quickstart_load(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data, run = blocks(DOCS / "quickstart.md", "yaml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "letters.yaml").write_text(data)
    (tmp_path / "letters.yaml").write_text(run)
    config = load_run("letters.yaml")
    assert config.data == load_data("data/letters.yaml")
    assert config.output_dir == "artifacts/runs/letters"
    assert config.model == load_run("hope/demo").model


def test_the_whole_campaign_of_the_page_can_be_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(block for block in blocks(DOCS / "campaigns.md", "yaml") if block.startswith("name:"))
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    done = CliRunner().invoke(app, ["campaign", "mine.yaml", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "niah" in done.output
    assert "artifacts/mine/runs/transformer" in done.output
