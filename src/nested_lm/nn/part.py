"""A part of a block, mixer or channel memory: how its parameters start, and what each of them is for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nested_lm.nn.layers import RMSNorm

Kind = Literal["embedding", "matrix", "vector", "memory"]

Normal = Callable[[Tensor, float], None]
"""Draws a tensor from a centred normal distribution of the given standard deviation, in place."""


class ParameterRole(NamedTuple):
    """What a parameter is for, so that the optimizer can treat it accordingly.

    level: index of the Continuum Memory level it belongs to; None outside the chain.
    """

    kind: Kind
    level: int | None


class Part(nn.Module, ABC):
    """Base of mixers and channel memories.

    roles: of the parameters that the part itself owns, by name. Weights of linear layers are matrices, and all that is
        not named is a vector, which the optimizer neither orthogonalises nor decays. `memory`: starts of fast weights.
    """

    roles: ClassVar[Mapping[str, Kind]] = {}

    @abstractmethod
    def output_projections(self) -> list[nn.Linear]:
        """The layers whose output is added to the residual stream: they start smaller in deep models."""

    def initialise(self, normal: Normal) -> None:
        """Set what is neither a linear layer nor a norm: those have been set before."""


@torch.no_grad()
def initialise(root: nn.Module, parts: Sequence[Part], normal: Normal, *, residual: float) -> None:
    """Set all parameters of some parts and of the norms around them.

    Matrices are normal with 1/sqrt(fan-in), norms are 1.

    Args:
        root: the module that holds them. Its linear layers are drawn first, in the order of `modules()`.
        parts: what is particular to each is set then, one after the other.
        normal: draws the numbers.
        residual: factor of the projections back into the residual stream.
    """
    outputs = {id(layer) for part in parts for layer in part.output_projections()}
    for module in root.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear):
            scale = residual if id(module) in outputs else 1.0
            normal(module.weight, scale / math.sqrt(module.in_features))
    for part in parts:
        part.initialise(normal)


def kinds(root: nn.Module) -> dict[str, Kind]:
    """What every parameter of a module is for, by name."""
    found: dict[str, Kind] = {}
    for path, module in root.named_modules():
        roles: Mapping[str, Kind] = {}
        if isinstance(module, nn.Linear):
            roles = {"weight": "matrix"}
        elif isinstance(module, nn.Embedding):
            roles = {"weight": "embedding"}
        elif isinstance(module, Part):
            roles = module.roles
        for name, _ in module.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = roles.get(name, "vector")
    return found
