"""Starting kernels: one place, so that launches can be counted and compiled without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Launch(NamedTuple):
    """What one kernel is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


_listeners: list[Callable[[Launch], None]] = []


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """Start a kernel; with tensors that have no values, only tell those who listen."""
    for listen in _listeners:
        listen(Launch(kernel, grid, arguments, constants, warps))
    if any(isinstance(x, FakeTensor) for x in arguments if isinstance(x, Tensor)):
        return
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=1)


def counting() -> bool:
    """Whether somebody listens."""
    return bool(_listeners)


@contextmanager
def listening(listen: Callable[[Launch], None]) -> Iterator[None]:
    """Be told of every launch."""
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)
