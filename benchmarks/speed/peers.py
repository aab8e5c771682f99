"""Virtual environments of the peers, below artifacts/bench, made when they are first needed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "artifacts" / "bench"

PEERS = {"nested_learning": "nested-learning==0.2.0", "titans_pytorch": "titans-pytorch==0.5.5"}


class PeerError(Exception):
    """A peer could not be installed; the message says why."""


def python_of(package: str) -> Path:
    """Interpreter of a peer's environment, which is made if it is not there.

    The environment gets the torch of this project's constraints and whatever else the peer asks for.

    Raises:
        PeerError: pip failed.
    """
    folder = FOLDER / package
    python, done, wanted = folder / "bin" / "python", folder / "installed.txt", f"{PEERS[package]}\n{_torch()}\n"
    if done.exists() and done.read_text() == wanted:
        return python
    FOLDER.mkdir(parents=True, exist_ok=True)
    constraints, log = FOLDER / "constraints.txt", FOLDER / f"{package}.log"
    constraints.write_text(_torch() + "\n")
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "-c", constraints]
    with log.open("w") as output:
        # torch goes first: with it in place the peer's requirements cannot pull a different build.
        for command in ([sys.executable, "-m", "venv", folder], [*install, "torch"], [*install, PEERS[package]]):
            ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
            if ended.returncode:
                last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
                raise PeerError(f"{PEERS[package]} cannot be installed: {' '.join(last)} (see {log})")
    done.write_text(wanted)
    return python


def _torch() -> str:
    """The line of constraints.txt that pins torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))
