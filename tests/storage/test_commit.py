import shutil
import subprocess
from pathlib import Path

import nested_lm
from nested_lm.storage import commit


def git(folder, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_repository_that_only_holds_an_installation_is_not_ours(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "my own project")
    package = tmp_path / ".venv" / "lib" / "site-packages" / "nested_lm"
    package.mkdir(parents=True)
    shutil.copyfile(nested_lm.__file__, package / "__init__.py")
    monkeypatch.setattr(commit, "_PACKAGE", package)
    assert commit.current_commit() is None
    git(tmp_path, "add", "-f", ".")
    git(tmp_path, "commit", "-q", "-m", "everything")
    assert commit.current_commit() is None


def test_a_checkout_is_ours(tmp_path, monkeypatch):
    package = tmp_path / "src" / "nested_lm"
    package.mkdir(parents=True)
    shutil.copyfile(nested_lm.__file__, package / "__init__.py")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(commit, "_PACKAGE", package)
    assert commit.current_commit() == git(tmp_path, "rev-parse", "HEAD").strip()
    Path(package / "__init__.py").write_text("")
    assert commit.current_commit().endswith("-dirty")
