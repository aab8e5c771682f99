"""How long threads of OpenMP spin at a barrier before they sleep.

torch's threads wait for each other at the end of every operation. On a machine with other work a spinning thread burns
the time of the one it waits for. The libraries read these settings when they are loaded, so they are set before torch
is imported.
"""

import os
from collections.abc import MutableMapping

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""For libgomp, which torch's wheels bring and MKL in them uses: rounds of a loop. For Intel's and LLVM's: ms."""

_OWN = ("OMP_WAIT_POLICY", *SHORT_SPIN)


def spin_shortly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, unless the user has said how they wait."""
    if not any(name in environment for name in _OWN):
        environment.update(SHORT_SPIN)


def describe_waiting(environment: MutableMapping[str, str] = os.environ) -> str:
    """How threads wait, as the libraries were told."""
    return ", ".join(f"{name}={environment[name]}" for name in _OWN if name in environment) or "as the libraries like"
