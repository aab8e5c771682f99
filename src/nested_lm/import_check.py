"""Import every module of the package: proof that nothing optional is needed to do so.

`python -m nested_lm.import_check` is run where only the core is installed.
"""

import importlib
import pkgutil

import nested_lm

ADAPTERS = ("nested_lm.eval.zeroshot.language_model",)
"""Modules that subclass what an optional package defines; whoever imports them has asked for it."""


def import_everything() -> list[str]:
    """Import every module below `nested_lm` but the entry point, this one and the adapters; return their names."""
    names = [
        module.name
        for module in pkgutil.walk_packages(nested_lm.__path__, prefix="nested_lm.")
        if not module.name.endswith((".__main__", ".import_check", *ADAPTERS))
    ]
    for name in names:
        importlib.import_module(name)
    return names


if __name__ == "__main__":
    print(f"{len(import_everything())} modules import with {nested_lm.__version__}")
