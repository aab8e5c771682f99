"""What a run must remember besides weights and moments to continue bit for bit."""

import base64
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

STATE_VERSION = 1


@dataclass
class Progress:
    """How far a run is.

    step: optimizer steps done, skipped ones included.
    tokens: tokens of those steps.
    seconds: time spent in steps, over all sittings.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def as_document(self) -> dict[str, Any]:
        """Fields for `train_state.json`."""
        return asdict(self)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries draw from the global generator)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """State of every global random generator, as JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, gauss_next = random.getstate()
    return {
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": [_encode(state.numpy()) for state in _cuda_states()],
        "numpy": [name, _encode(keys), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global random generator where it was.

    CUDA generators are restored when the number of devices is the same; with another number the saved states
    have no owner, and the devices keep the seed of the run.
    """
    torch.set_rng_state(torch.from_numpy(_decode(state["torch"], np.uint8)))
    if len(state["cuda"]) == len(_cuda_states()) and state["cuda"]:
        torch.cuda.set_rng_state_all([torch.from_numpy(_decode(item, np.uint8)) for item in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, _decode(keys, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))


def _cuda_states() -> list[torch.Tensor]:
    """States of the CUDA generators; none without CUDA."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _encode(array: np.ndarray) -> str:
    """Bytes of an array as text."""
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: type) -> np.ndarray:
    """Inverse of `_encode`; a copy that may be written."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
