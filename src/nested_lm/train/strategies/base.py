"""How a model is spread over devices: the seam between the loop and parallelism."""

import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nested_lm.config.train import TrainConfig
from nested_lm.errors import ConfigError

T = TypeVar("T")


class Strategy(Protocol):
    """How one model is spread over devices. Holds no loss, schedule or logging.

    Every method but `accumulate` and `backward` may talk to the other ranks, so all ranks must call it, in one order.
    """

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

    def step_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Step an optimizer that must see whole parameters, such as one that orthogonalises matrices."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect whole tensors for a checkpoint. Only rank 0, which writes it, gets them; the others get nothing."""
        ...

    def place(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut whole tensors as those of the same name and shape in `like` are; leave the others whole."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """Collect one tensor on every rank."""
        ...

    def own(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that lies on this rank."""
        ...

    def reduce(self, values: Sequence[float], how: Literal["sum", "max"]) -> list[float]:
        """Add numbers over all ranks, or take the largest, each for itself; float64."""
        ...

    def share(self, item: T) -> list[T]:
        """Items of all ranks, in their order. For small and rare things."""
        ...

    def lead(self, action: Callable[[], T]) -> T:
        """Let rank 0 act, such as write a file; its result, or its error, is that of every rank."""
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

    def step_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Every parameter is whole already."""
        optimizer.step()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor is whole already."""
        return dict(tensors)

    def place(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing is cut."""
        del like
        return dict(tensors)

    def whole(self, tensor: Tensor) -> Tensor:
        """It is."""
        return tensor

    def own(self, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor

    def reduce(self, values: Sequence[float], how: Literal["sum", "max"]) -> list[float]:
        """There is one rank."""
        del how
        return [float(value) for value in values]

    def share(self, item: T) -> list[T]:
        """There is one rank."""
        return [item]

    def lead(self, action: Callable[[], T]) -> T:
        """Act."""
        return action()


@contextmanager
def open_strategy(config: TrainConfig) -> Iterator[Strategy]:
    """Choose how a run is spread, from its configuration and the launcher's environment.

    `fsdp2` with one process is the single device: there is nothing to spread, and the numbers are the same.

    Raises:
        ConfigError: a device that is not there, or several processes and a strategy for one.
    """
    device = choose_device(config.device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if world_size == 1:
        yield SingleDevice(device)
        return
    if config.strategy == "single":
        raise ConfigError(
            f"{world_size} processes were launched, but train.strategy is single, so each would train the whole run; "
            "set train.strategy=fsdp2, or start one process without torchrun"
        )
    from nested_lm.train.strategies.fsdp import FullyShard

    with FullyShard.launched(device) as strategy:
        yield strategy


def micro_batches(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """Share a step's sequences among ranks: micro-batches of a rank, and the sequences in each.

    Ranks share the micro-batches as far as these divide, then the sequences of each, so that the sequences of a step
    are the same for any number of ranks and no rank holds more than `batch_size` at once.

    Raises:
        ConfigError: the ranks cannot share a step evenly.
    """
    fewer = math.gcd(config.accumulation, world_size)
    rest = world_size // fewer
    if config.batch_size % rest:
        total = config.accumulation * config.batch_size
        near = max(count for count in range(1, world_size) if total % count == 0)
        raise ConfigError(
            f"{world_size} processes cannot share a step of {config.accumulation} micro-batches of "
            f"{config.batch_size} sequences evenly; start a number of processes that divides {total}, such as {near}, "
            "or change train.accumulation (the clocks of the model count whole steps)"
        )
    return config.accumulation // fewer, config.batch_size // rest


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
