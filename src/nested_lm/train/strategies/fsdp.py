"""FSDP2: parameters, gradients and optimizer state cut over the ranks, gathered block by block when they are used.

Fast weights are activations of the rank that reads the sequence: they are neither cut nor exchanged.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nested_lm.errors import ConfigError, NestedLMError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)  # of one exchange; the slowest wait is for rank 0 to write a checkpoint
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class FullyShard:
    """`fully_shard` on every block and on the whole model, over all ranks.

    Parameters keep their type: with `bfloat16` precision the products are cast by autocast, as on one device, so that
    the number of ranks does not change the arithmetic. Gradients are summed, not averaged, because every rank divides
    its losses by the scored tokens of all ranks.

    mesh: one dimension, all ranks.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh) -> None:
        self.device = device
        self.rank = mesh.get_rank()
        self.world_size = mesh.size()
        self._mesh = mesh
        self._model: FSDPModule | None = None

    @classmethod
    @contextmanager
    def launched(cls, device: torch.device) -> Iterator[Self]:
        """Join the processes that torchrun started: over NCCL between CUDA devices, over gloo between CPUs."""
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        yield cls(device, init_device_mesh(device.type, (dist.get_world_size(),)))
        # Not after an error: the others may be waiting, and the launcher ends them once this process is gone.
        dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Cut the parameters in place; the model is gathered one block at a time when it runs.

        Raises:
            ConfigError: the model writes Continuum Memory levels in context.
        """
        if getattr(model, "writer", None) is not None:
            raise ConfigError(
                "train.strategy fsdp2 cannot train levels that are written in context (channel.in_context): their "
                "writes read the learned weights of all blocks at once, and those are cut over the processes; "
                "train with one process, or without in_context"
            )
        # Logits and convolution tails are views; nothing changes them in place, which is what the warning is about.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
        for block in model.blocks:
            fully_shard(block, mesh=self._mesh)
        sharded = fully_shard(model, mesh=self._mesh)
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction by a given factor
                module.set_gradient_divide_factor(1.0)
        self._model = sharded
        return sharded

    @contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        """Keep whole gradients on each rank until the last micro-batch, whose backward sums and cuts them."""
        assert self._model is not None
        self._model.set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss."""
        loss.backward()

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Norm over the gradients of all ranks together."""
        return self.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, *, norm: Tensor) -> None:
        """Scale every rank's part by the same factor."""
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    @torch.no_grad()
    def step_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every rank step whole stand-ins of the parameters, one at a time, and keep its part of the outcome.

        Products of cut matrices would be rounded in another order, which Muon's bfloat16 iteration turns into other
        updates, and would exchange more than the matrices themselves. State of a parameter's shape is cut like it.
        """
        members = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            for parameter in parameters:
                if parameter.grad is not None:
                    stand_in = nn.Parameter(self.whole(parameter.detach()))
                    stand_in.grad = self.whole(parameter.grad)
                    state = optimizer.state.pop(parameter, {})
                    optimizer.state[stand_in] = {key: self.whole(value) for key, value in state.items()}
                    group["params"] = [stand_in]
                    optimizer.step()
                    state = optimizer.state.pop(stand_in)
                    optimizer.state[parameter] = {key: self._part(value, parameter) for key, value in state.items()}
                    parameter.copy_(self._part(stand_in.detach(), parameter))
            group["params"] = []
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            group["params"] = parameters

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect whole tensors in the memory of rank 0's host, one at a time."""
        found = {}
        for name, tensor in tensors.items():
            whole = self.whole(tensor.detach())
            if self.rank == 0:
                found[name] = whole.cpu()
        return found

    def place(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep this rank's part of each tensor; every rank was given all of it, so nothing is sent."""
        return {name: self._part(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}

    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a cut tensor; others are whole already."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's part of a cut tensor; it may be empty."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def reduce(self, values: Sequence[float], how: Literal["sum", "max"]) -> list[float]:
        """Exchange the numbers in one message."""
        packed = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, op=_OPERATIONS[how])
        return packed.tolist()

    def share(self, item: T) -> list[T]:
        """Exchange pickled items between processes of one run."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def lead(self, action: Callable[[], T]) -> T:
        """Act on rank 0 and send the outcome to the others."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except NestedLMError as error:  # of the user's world: every rank reports it and ends
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This rank's part of a whole tensor, when it is of the shape of a cut one."""
        if not isinstance(like, DTensor) or like.shape != tensor.shape:
            return tensor
        return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements, src_data_rank=None)
