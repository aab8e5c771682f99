"""Stock tasks of the LM Evaluation Harness, with data from the hub or from a data folder. Never prompts of our own."""

import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_lm.errors import ConfigError, DataError, pip_install
from nested_lm_lab.tasks.zeroshot.tasks import HARNESS_VERSION, TASKS, ZeroShotTask

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_INSTALL = pip_install("eval")


def require_harness() -> Path:
    """Folder of the harness's task files. Its chatter is turned off.

    Raises:
        ConfigError: it is not installed, or is another release.
    """
    try:
        found = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"zero-shot tasks need lm-eval {HARNESS_VERSION}, which is missing; {_INSTALL}") from None
    if found != HARNESS_VERSION:
        raise ConfigError(
            f"lm-eval {found} is installed, zero-shot tasks need {HARNESS_VERSION}: scores move between releases; "
            f"{_INSTALL}"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def hash_of_files(root: Path, files: Sequence[str]) -> str:
    """sha256 of task files: of each its name below `root` and its content."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def check_task_files(root: Path, task: ZeroShotTask) -> None:
    """Refuse a task whose files were changed.

    Raises:
        DataError: a file is missing, or the hash is another.
    """
    try:
        found = hash_of_files(root, task.files)
    except OSError as error:
        raise DataError(f"task {task.name}: {error.filename} cannot be read: {error.strerror}; {_INSTALL}") from error
    if found != task.sha256:
        raise DataError(
            f"task {task.name}: {', '.join(str(root / name) for name in task.files)} changed\n"
            f"  expected sha256 {task.sha256}, found {found}\n"
            f"  Scores of changed prompts compare with nothing. Install the harness again: {_INSTALL} --force-reinstall"
        )


@contextmanager
def open_tasks(names: Sequence[str], files: Mapping[str, Path] | None) -> Iterator[dict[str, "Task"]]:
    """Load tasks of the harness, with 0 shots.

    Args:
        names: of tasks.
        files: JSON lines of each task, verified already; None: the Hugging Face hub.

    Raises:
        ConfigError: the harness is missing or another release.
        DataError: a task file was changed, or its data cannot be had.
    """
    root = require_harness()
    for name in names:
        check_task_files(root, TASKS[name])
    import datasets
    import yaml
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="nested-lm-tasks-") as folder:
        for name in names:
            settings = _task_settings(root, TASKS[name], None if files is None else files[name], Path(folder) / "cache")
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        manager = TaskManager(include_path=folder, include_defaults=False)
        loaded = {name: _load(manager, name, is_local=files is not None) for name in names}
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
        yield loaded


def build_requests(task: "Task", limit: int | None) -> None:
    """Let a task make its requests, of all documents or the first ones, without its progress bar."""
    with redirect_stderr(io.StringIO()):
        task.build_all_requests(limit=limit, rank=0, world_size=1)


def _task_settings(root: Path, task: ZeroShotTask, data: Path | None, cache: Path) -> dict[str, Any]:
    """A task file that includes the stock one and changes nothing but where the documents come from."""
    settings: dict[str, Any] = {"include": str(root / task.files[0]), "task": task.name}
    if data is None:
        return settings
    settings |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(data.resolve())}, "cache_dir": str(cache)},
        "training_split": None,
    }
    if task.split == "test":
        settings["validation_split"] = None
    if task.name == "hellaswag":  # the files of data folders hold what `process_docs` makes
        settings["process_docs"] = None
    return settings


def _load(manager: Any, name: str, *, is_local: bool) -> "Task":
    """Load one task with its documents."""
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:  # `datasets` raises what the hub, the network or a file gave it
        task = TASKS[name]
        source = "the data folder" if is_local else f"{task.dataset} on the Hugging Face hub"
        advice = (
            "Make the folder again with `nested-lm eval zeroshot-data`."
            if is_local
            else "Without a network, name a folder with --data-dir; `nested-lm eval zeroshot-data` makes one."
        )
        raise DataError(
            f"task {name}: its documents cannot be read from {source}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}\n  {advice}"
        ) from error
