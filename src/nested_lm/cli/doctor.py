"""Checks of the machine and the installation, each with the fix when it fails."""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nested_lm.cli.threads import describe_waiting
from nested_lm.errors import NestedLMError, pip_install

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)
MIN_FREE_BYTES = 500 * 10**6  # the demo writes less
WARN_FREE_BYTES = 5 * 10**9

RESERVED = "reserved: nothing uses it yet"
EXTRAS = {  # extra of this package: modules it brings, what they are for
    "plot": (("matplotlib",), "figures of the report"),
    "data": (("pyarrow", "zstandard"), "Parquet and .zst sources"),
    "eval": (("lm_eval", "datasets", "sacrebleu"), "zero-shot tasks, chrF"),
    "slurm": (("submitit",), "campaigns as Slurm jobs"),
    "ray": (("ray",), "campaigns as Ray tasks"),
    "wandb": (("wandb",), "metrics in Weights & Biases"),
    "tensorboard": (("tensorboard",), "metrics in TensorBoard"),
    "deepspeed": (("deepspeed",), RESERVED),
    "gpu": (("fla", "triton"), "GPU kernels of linear attention and the DeltaNets (mixer.backend: fla)"),
    "hf": (("huggingface_hub",), "conversion of models on the Hugging Face hub"),
}


@dataclass(frozen=True)
class Check:
    """One finding. `failed`: the program cannot work; `absent`: an optional part is not there."""

    name: str
    state: Literal["ok", "absent", "warning", "failed"]
    found: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n{'':<9} {'':<17} fix: {self.fix}" if self.fix else ""
        return f"{self.state:<9} {self.name:<17} {self.found}{fix}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def examine(output: Path) -> list[Check]:
    """Make every check; `output` is the folder that runs would be written to."""
    return [
        _python(),
        *_torch(),
        _presets(),
        *_corpora(),
        _writable(output),
        _free_disk(output),
        *(_extra(name) for name in EXTRAS),
    ]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        return Check("python", "failed", found, f"install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Check("python", "ok", found)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("torch", "failed", f"cannot be imported: {error}", "pip install 'torch>=2.11'")
        return
    version = str(torch.__version__)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < MIN_TORCH:
        yield Check("torch", "failed", version, f"pip install 'torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}'")
    else:
        yield Check("torch", "ok", version)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Check("device", "ok", f"{torch.cuda.device_count()} x {properties.name}, {memory}")
    else:
        yield Check("device", "ok", f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    yield Check("waiting threads", "ok", f"{describe_waiting()}; set any of these yourself to change how threads wait")
    yield _memories_in_c()


def _memories_in_c() -> Check:
    """Build the C library of the memories, where that has not been done: a training would do it at its first step."""
    from nested_lm.ops.memory.cpu import library as cpu_library

    began = time.perf_counter()
    reason = cpu_library.reason_missing()
    seconds = time.perf_counter() - began
    if reason is not None:
        found = f"{reason}; on a CPU the memories run in torch, at a half to a quarter of the speed"
        return Check("memories in C", "absent", found, "install a C compiler (apt-get install gcc), or name one in $CC")
    found = f"{cpu_library.compiler_version()}; ready in {seconds:.1f} s, in {cpu_library.cache_folder()}"
    return Check("memories in C", "ok", found)


def _presets() -> Check:
    from nested_lm.config.compose import preset_names, presets_folder

    try:
        return Check("presets", "ok", f"{len(preset_names())} files in {presets_folder()}")
    except NestedLMError as error:
        return Check("presets", "failed", str(error), "pip install --force-reinstall --no-deps nested-lm")


def _corpora() -> Iterator[Check]:
    from nested_lm.data.corpora import CORPORA, read_archive

    for name, corpus in CORPORA.items():
        try:
            size = len(read_archive(corpus))
        except NestedLMError as error:
            fix = "pip install --force-reinstall --no-deps nested-lm"
            yield Check(f"corpus {name}", "failed", str(error).replace("\n ", ""), fix)
        else:
            yield Check(f"corpus {name}", "ok", f"{size / 1e6:.1f} MB, sha256 as shipped")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _writable(output: Path) -> Check:
    folder = _existing(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "choose another folder with output_dir=..., or change its rights"
        return Check("output folder", "failed", f"{folder}: {error.strerror}", fix)
    return Check("output folder", "ok", f"{output} can be written")


def _free_disk(output: Path) -> Check:
    free = shutil.disk_usage(_existing(output)).free
    found = f"{free / 1e9:.1f} GB free for {output}"
    fix = "free some space, or choose a folder on another disk with output_dir=..."
    if free < MIN_FREE_BYTES:
        return Check("free disk", "failed", f"{found}; the demo needs {MIN_FREE_BYTES / 1e9:.1f} GB", fix)
    if free < WARN_FREE_BYTES:
        return Check("free disk", "warning", f"{found}; longer runs keep larger checkpoints", fix)
    return Check("free disk", "ok", found)


def _extra(name: str) -> Check:
    modules, purpose = EXTRAS[name]
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        found = f"{purpose}: no {', '.join(absent)}"
        fix = "" if purpose == RESERVED else pip_install(name)
        return Check(f"extra {name}", "absent", found, fix)
    return Check(f"extra {name}", "ok", purpose)
