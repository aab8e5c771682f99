"""Import every module of both packages: proof that nothing optional is needed to do so.

`python -m nested_lm.cli.import_check` is run where only the core's requirements are installed.
"""

import importlib
import pkgutil

import nested_lm

PACKAGES = ("nested_lm", "nested_lm_lab")

_KERNELS = ("errors", "generate", "momentum", "read", "run", "solve", "tiles")
ADAPTERS = (
    "nested_lm_lab.tasks.zeroshot.language_model",
    "nested_lm.ops.triangular_triton",
    *(f"nested_lm.ops.memory.triton.{name}" for name in _KERNELS),
)
"""Modules written in what an optional package defines; whoever imports them has asked for it."""


def import_everything() -> list[str]:
    """Import every module but the entry point, this one and the adapters; return their names."""
    names = [
        module.name
        for package in map(importlib.import_module, PACKAGES)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
        if not module.name.endswith((".__main__", ".import_check", *ADAPTERS))
    ]
    for name in names:
        importlib.import_module(name)
    return names


if __name__ == "__main__":
    print(f"{len(import_everything())} modules import with {nested_lm.__version__}")
