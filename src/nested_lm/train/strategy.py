"""How a model is spread over devices: the seam between the loop and parallelism."""

import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nested_lm.errors import ConfigError


class Strategy(Protocol):
    """How one model is spread over devices. Holds no loss, schedule or logging."""

    device: torch.device
    rank: int
    world_size: int

    def wrap(self, model: nn.Module) -> nn.Module:
        """Put the model on its devices; the result has the same parameters under the same names."""
        ...

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surround the forward and backward pass of one micro-batch; gradients are exchanged at the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss."""
        ...

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Compute the global norm of the gradients, without changing them."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, *, norm: Tensor) -> None:
        """Scale gradients of global norm `norm` down to at most `max_norm`."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect whole tensors for a checkpoint. Collective: every rank calls it; rank 0 writes."""
        ...


class SingleDevice:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device."""
        return model.to(self.device)

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Nothing to exchange, whichever micro-batch it is."""
        del is_last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss."""
        loss.backward()

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Norm over all gradients together."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, *, norm: Tensor) -> None:
        """Scale in place."""
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor is whole already."""
        return dict(tensors)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Find the device of a run: CUDA when it is there and nothing else was asked for.

    Raises:
        ConfigError: CUDA was asked for and this machine or this torch has none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'no version'}"
        raise ConfigError(
            f"train.device is cuda, but no CUDA device is available ({built}); allowed here: auto, cpu. "
            "Install a CUDA build of torch, or set train.device=auto"
        )
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory use of this process so far: of the CUDA allocator, or resident on a CPU machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
