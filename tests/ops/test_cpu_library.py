"""The C of the memories is built once, in a place that can be written to; what is in the way is said."""

import ctypes
import hashlib
import os
import re
import subprocess
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
        built = cpu_library.library_path(DOUBLE)
        assert sorted(cache.iterdir()) == sorted([built, built.with_suffix(".sha256")])
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
        built = cpu_library.library_path(DOUBLE)
        assert sorted(cache.iterdir()) == sorted([built, built.with_suffix(".sha256")])

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

    @pytest.mark.parametrize(
        "damage", ["empty", "cut", "flipped", "no digest", "another digest", "open to others", "link"]
    )
    def test_a_damaged_library_is_built_again(self, cache, damage, tmp_path):
        """Unnoticed, a file that is cut ends the process with `Bus error`, and a flipped bit changes numbers."""
        path = cpu_library.library_path(DOUBLE)
        cpu_library._compile(path, "double")
        whole, digest = path.read_bytes(), path.with_suffix(".sha256")
        assert cpu_library._is_intact(path)
        if damage == "no digest":
            digest.unlink()
        elif damage == "another digest":
            digest.write_bytes(b"\xff" * 64)
        elif damage == "open to others":
            path.chmod(0o777)
        elif damage == "link":
            path.rename(tmp_path / "elsewhere.so")
            path.symlink_to(tmp_path / "elsewhere.so")
        else:
            middle = len(whole) // 2
            flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            path.unlink()
            path.write_bytes({"empty": b"", "cut": whole[:middle], "flipped": flipped}[damage])
        assert not cpu_library._is_intact(path)
        assert works(cpu_library.load(DOUBLE))
        assert path.read_bytes() == whole
        assert cpu_library._is_intact(path)

    def test_what_the_compiler_refuses_is_said_and_leaves_nothing(self, cache, monkeypatch, tmp_path):
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "memory.c").write_text("int forward(void) { return unknown; }\n")
        monkeypatch.setattr(cpu_library, "SOURCES", tmp_path / "sources")
        assert re.search(
            r"could not build the C library: .*memory\.c.* error: .unknown. undeclared", cpu_library.reason_missing()
        )
        assert list(cache.iterdir()) == []


PLANTED = "__attribute__((constructor)) static void planted(void) { __builtin_trap(); }\n"
"""C of a library that ends the process that loads it."""


@needs_compiler
class TestTheCache:
    """Where the user's cannot be trusted or written to, the temporary folder serves, in a folder of the user's own."""

    @pytest.fixture
    def temporary(self, cache, monkeypatch, tmp_path):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        fresh = cpu_library._folder_of_this_process.__wrapped__
        monkeypatch.setattr(cpu_library, "_folder_of_this_process", fresh)
        return tmp_path / "temporary" / f"nested-lm-{os.getuid()}"

    @staticmethod
    def plant(folder):
        """Put a library that must not be loaded, with its digest, where the real one would be."""
        folder.mkdir(exist_ok=True)
        path = folder / cpu_library.library_path(DOUBLE).name
        (folder / "planted.c").write_text(PLANTED)
        subprocess.run([*cpu_library.compiler(), "-shared", "-fPIC", "-o", path, folder / "planted.c"], check=True)
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())

    def test_that_cannot_be_made(self, temporary, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert works(cpu_library.load(DOUBLE))
        assert {path.parent for path in temporary.iterdir()} == {temporary}
        assert temporary.stat().st_mode & 0o777 == 0o700

    def test_that_is_read_only(self, temporary, cache, monkeypatch):
        able = os.access  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != cache and able(path, mode))
        assert cpu_library.library_path(DOUBLE).parent == temporary

    def test_of_a_user_without_a_home(self, temporary, monkeypatch):
        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        assert cpu_library.library_path(DOUBLE).parent == temporary

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777])
    def test_that_others_may_write_to_is_not_trusted(self, temporary, cache, mode):
        self.plant(cache)
        cache.chmod(mode)
        assert cpu_library.cache_folder() == temporary
        assert works(cpu_library.load(DOUBLE))

    def test_in_a_folder_that_all_may_write_to_is_not_trusted(self, temporary, cache, tmp_path):
        self.plant(cache)
        tmp_path.chmod(0o777)
        assert cpu_library.cache_folder() not in (cache, temporary)  # both could be led elsewhere

    def test_that_is_a_link_is_not_trusted(self, temporary, cache, tmp_path):
        self.plant(tmp_path / "foreign")
        cache.rmdir()
        cache.symlink_to(tmp_path / "foreign")
        assert cpu_library.cache_folder() == temporary
        temporary.rmdir()
        temporary.symlink_to(tmp_path / "foreign")
        folder = cpu_library.cache_folder()
        assert folder.parent == temporary.parent
        assert not folder.is_symlink()
        assert folder != temporary
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_of_somebody_else_is_not_trusted(self, temporary, cache, monkeypatch):
        self.plant(cache)
        other = os.getuid() + 1
        self.plant(temporary.with_name(f"nested-lm-{other}"))
        monkeypatch.setattr(os, "getuid", lambda: other)
        assert cpu_library.cache_folder().name not in (cache.name, f"nested-lm-{other}")

    def test_is_below_the_home_by_default(self, cache, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert cpu_library.library_path(DOUBLE).parent == tmp_path / ".cache" / "nested-lm"


class TestACompilerThatIsMissing:
    @pytest.mark.parametrize("command", ["/nonexistent", 'gcc "', " ", "a b c", "-O3", "/"])
    def test_is_said_with_what_was_asked_for(self, cache, monkeypatch, command):
        monkeypatch.setenv("CC", command)
        reason = cpu_library.reason_missing()
        assert reason.startswith(f"$CC is `{command}`, which is no command here; name a C compiler in it")

    def test_is_said_where_none_was_named(self, cache, monkeypatch):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("shutil.which", lambda command: None)
        assert cpu_library.reason_missing().startswith("no C compiler was found: there is no `cc`; install one")

    def test_an_empty_name_is_none(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "")
        assert cpu_library.compiler() in (["cc"], None)

    def test_is_part_of_what_a_measurement_says_of_its_machine(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "/nonexistent")
        assert cpu_library.describe().startswith("in torch: $CC is `/nonexistent`")

    @pytest.mark.parametrize("command", ["false", "true", "echo"])
    def test_so_is_one_that_is_none(self, cache, monkeypatch, command):
        monkeypatch.setenv("CC", command)
        assert cpu_library.reason_missing().startswith(f"`{command}` could not build the C library: ")

    def test_so_is_one_that_never_ends(self, cache, monkeypatch, tmp_path):
        (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / "slow").chmod(0o700)
        monkeypatch.setenv("CC", str(tmp_path / "slow"))
        monkeypatch.setattr(cpu_library, "TIMEOUT", 0.2)
        assert re.search(r"could not build the C library: .* timed out after 0.2 seconds", cpu_library.reason_missing())
