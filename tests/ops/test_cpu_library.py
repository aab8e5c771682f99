"""The C of the memories is built once, in a place that can be written to; what is in the way is said."""

import ctypes
import os
import re
import threading
from pathlib import Path

import pytest
import torch

from nested_lm.ops.memory.cpu import library as cpu_library

DOUBLE = torch.float64

needs_compiler = pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache that is empty, a compiler that does not optimise, and nothing remembered from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_library, "FLAGS", ("-O0", *cpu_library.FLAGS[1:]))
    monkeypatch.setattr(cpu_library, "load", cpu_library.load.__wrapped__)
    monkeypatch.setattr(cpu_library, "reason_missing", cpu_library.reason_missing.__wrapped__)
    return tmp_path / "nested-lm"


def works(library):
    library.saved_numbers.restype = ctypes.c_int64
    return callable(library.forward) and callable(library.backward)


def test_the_sources_are_where_they_are_looked_for_and_are_all_that_is_there():
    """They are read from the installed package: the wheel holds every file below src/nested_lm."""
    package = Path(__file__).parents[2] / "src" / "nested_lm"
    assert cpu_library.SOURCES.resolve() == package / "ops" / "memory" / "cpu" / "c"
    wanted, found = ["memory.c"], set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        wanted += re.findall(r'#include "([^"]+)"', (cpu_library.SOURCES / name).read_text(encoding="utf-8"))
    assert {path.name for path in cpu_library.SOURCES.iterdir()} == found


@needs_compiler
class TestBuilding:
    def test_happens_once(self, cache, monkeypatch):
        assert works(cpu_library.load(DOUBLE))
        [built] = cache.iterdir()
        assert built == cpu_library.library_path(DOUBLE)
        monkeypatch.setattr(cpu_library, "_compile", lambda *arguments: pytest.fail("compiled again"))
        assert works(cpu_library.load(DOUBLE))

    def test_is_part_of_what_a_measurement_says_of_its_machine(self, cache):
        assert cpu_library.describe() == f"in C ({cpu_library.compiler_version()})"
        assert re.search(r"\d", cpu_library.compiler_version())

    def test_by_several_at_once_does_no_harm(self, cache):
        found = []

        def build():
            found.append(works(cpu_library.load(DOUBLE)))

        builders = [threading.Thread(target=build) for _ in range(3)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert found == [True] * 3
        assert list(cache.iterdir()) == [cpu_library.library_path(DOUBLE)]

    def test_again_when_a_source_a_flag_or_the_compiler_changes(self, cache, monkeypatch, tmp_path):
        paths = {cpu_library.library_path(DOUBLE), cpu_library.library_path(torch.float32)}
        with monkeypatch.context() as patch:
            patch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "-DOTHER"))
            paths.add(cpu_library.library_path(DOUBLE))
        with monkeypatch.context() as patch:
            patch.setenv("CC", f"{cpu_library.compiler()[0]} -DOTHER")
            paths.add(cpu_library.library_path(DOUBLE))
        with monkeypatch.context() as patch:
            patch.setattr(cpu_library, "_processor", lambda: "another")
            paths.add(cpu_library.library_path(DOUBLE))
        sources = tmp_path / "sources"
        sources.mkdir()
        for source in cpu_library.SOURCES.iterdir():
            (sources / source.name).write_bytes(source.read_bytes() + b"\n")
        monkeypatch.setattr(cpu_library, "SOURCES", sources)
        paths.add(cpu_library.library_path(DOUBLE))
        assert len(paths) == 6

    def test_a_damaged_library_is_built_again(self, cache):
        path = cpu_library.library_path(DOUBLE)
        path.write_bytes(b"")
        assert works(cpu_library.load(DOUBLE))
        assert path.stat().st_size > 0

    def test_what_the_compiler_refuses_is_said_and_leaves_nothing(self, cache, monkeypatch, tmp_path):
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "memory.c").write_text("int forward(void) { return unknown; }\n")
        monkeypatch.setattr(cpu_library, "SOURCES", tmp_path / "sources")
        assert re.search(
            r"could not build the C library: .*memory\.c.* error: .unknown. undeclared", cpu_library.reason_missing()
        )
        assert list(cache.iterdir()) == []


@needs_compiler
class TestTheCache:
    """Where the user's cannot be written to, the temporary folder serves, in a folder of the user's own."""

    @pytest.fixture
    def temporary(self, cache, monkeypatch, tmp_path):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        return tmp_path / "temporary" / f"nested-lm-{os.getuid()}"

    def test_that_cannot_be_made(self, temporary, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert works(cpu_library.load(DOUBLE))
        assert [path.parent for path in temporary.iterdir()] == [temporary]
        assert temporary.stat().st_mode & 0o777 == 0o700

    def test_that_is_read_only(self, temporary, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
        assert cpu_library.library_path(DOUBLE).parent == temporary

    def test_of_a_user_without_a_home(self, temporary, monkeypatch):
        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        assert cpu_library.library_path(DOUBLE).parent == temporary

    def test_of_somebody_else_is_not_trusted(self, temporary, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        temporary.mkdir()
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        temporary.rename(temporary.with_name(f"nested-lm-{owner + 1}"))
        assert "belongs to somebody else" in cpu_library.reason_missing()

    def test_is_below_the_home_by_default(self, cache, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert cpu_library.library_path(DOUBLE).parent == tmp_path / ".cache" / "nested-lm"


class TestACompilerThatIsMissing:
    @pytest.mark.parametrize("command", ["/nonexistent", ""])
    def test_is_said(self, cache, monkeypatch, command):
        monkeypatch.setenv("CC", command)
        reason = (
            "no C compiler was found (looked for $CC, then cc); install one (apt-get install gcc) or name one in $CC"
        )
        assert cpu_library.reason_missing() == reason

    def test_is_part_of_what_a_measurement_says_of_its_machine(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "/nonexistent")
        assert cpu_library.describe().startswith("in torch: no C compiler was found")

    def test_so_is_one_that_is_none(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "false")
        assert cpu_library.reason_missing().startswith("`false` could not build the C library: ")
