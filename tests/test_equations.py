"""Every numbered equation that the code names has a row in docs/equations.md, and a missing one is noticed."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EQUATIONS = ROOT / "docs" / "equations.md"
SOURCES = sorted((ROOT / "src").rglob("*.py"))

NESTED_LEARNING, TITANS = "2512.24695", "2501.00663"
NUMBERS = r"\d+(?:-\d+)?(?:(?:, | and )\d+(?:-\d+)?)*"
REFERENCE = re.compile(rf"arXiv (\d{{4}}\.\d{{5}})|(Titans )?\beqs?\. ({NUMBERS})")
ROW = re.compile(rf"\| (Titans )?({NUMBERS})\b")


def numbers(text):
    """Numbers of a list such as `5, 14-16 and 18`."""
    found = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def named_in(text):
    """(paper, number) of each equation that a docstring or comment names; the paper is the last one named before."""
    paper, found = NESTED_LEARNING, set()
    for arxiv, titans, listed in REFERENCE.findall(" ".join(text.split())):
        if arxiv:
            paper = arxiv
        else:
            found |= {(TITANS if titans else paper, number) for number in numbers(listed)}
    return found


def texts(source):
    """Docstrings and comments of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def rows(page):
    """(paper, number) of each row of the table of equations."""
    found = set()
    for titans, listed in ROW.findall(page):
        found |= {(TITANS if titans else NESTED_LEARNING, number) for number in numbers(listed)}
    return found


def without_row(source, page):
    """Equations of the two papers that a module names and the table does not have."""
    named = {pair for text in texts(source) for pair in named_in(text)}
    return sorted(pair for pair in named - rows(page) if pair[0] in (NESTED_LEARNING, TITANS))


def test_every_equation_that_the_code_names_has_a_row():
    page = EQUATIONS.read_text(encoding="utf-8")
    found = {str(path.relative_to(ROOT)): without_row(path.read_text(encoding="utf-8"), page) for path in SOURCES}
    assert {path: missing for path, missing in found.items() if missing} == {}


def test_the_code_names_many_equations():
    found = {pair for path in SOURCES for text in texts(path.read_text(encoding="utf-8")) for pair in named_in(text)}
    assert {(NESTED_LEARNING, 57), (NESTED_LEARNING, 88), (TITANS, 10), (TITANS, 25)} <= found


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("eq. 57", []),
        ("eqs. 56-58", [(NESTED_LEARNING, 58)]),
        ("eqs. 57, 59 and 61", [(NESTED_LEARNING, 59), (NESTED_LEARNING, 61)]),
        ("Titans eq. 10", []),
        ("Titans eq. 11", [(TITANS, 11)]),
        ("arXiv 2501.00663 section 4, eqs.\n    10-11", [(TITANS, 11)]),
        ("arXiv 2412.06464 eq. 99", []),
        ("arXiv 2412.06464 eq. 99; arXiv 2512.24695 eq. 98", [(NESTED_LEARNING, 98)]),
    ],
)
def test_a_missing_row_is_noticed(text, missing):
    page = "| Equation | Code |\n|---|---|\n| 56-57: DGD | x |\n| Titans 10: momentum | x |\n"
    assert without_row(f'"""{text}"""\n', page) == missing
    assert without_row(f"x = 1  # {' '.join(text.split())}\n", page) == missing


def test_a_row_that_is_taken_out_is_missed():
    """The check is not satisfied by the page as a whole: without the row of eq. 75, M3 is found."""
    page = re.sub(r"^\| 75.*$", "", EQUATIONS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    source = (ROOT / "src" / "nested_lm" / "ops" / "update_rules" / "orthogonal.py").read_text(encoding="utf-8")
    assert without_row(source, page) == [(NESTED_LEARNING, 75)]
