"""Which parameter gets which optimizer, by role and level: nothing left over, nothing twice.

The rule:

* weight decay acts on matrices (kind `matrix`) only; embeddings, vectors (norms, gates, convolutions) and the
  learned starts of the memories have none, because shrinking them changes what the model reads or where its
  memories start instead of limiting what a product can grow to;
* `adamw` steps everything with AdamW at `rate`;
* `muon` steps matrices with Muon at `rate` and everything else with AdamW at `adamw_rate`;
* parameters of a Continuum Memory level keep their level, which says when they are stepped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from nested_lm.config.train import Muon, Optimizer


class Role(Protocol):
    """What a parameter is for, as the model says it."""

    @property
    def kind(self) -> Literal["embedding", "matrix", "vector", "memory"]:
        """What the parameter is used as."""
        ...

    @property
    def level(self) -> int | None:
        """Index of its Continuum Memory level; None outside the chain."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share an optimizer, a rate, a decay and a clock.

    label: name in metrics, such as `matrix` or `level1/matrix`.
    method: optimizer that steps the group.
    level: Continuum Memory level whose clock the group follows; None: every step.
    rate: peak learning rate.
    weight_decay: decoupled, multiplied by the rate.
    names: the parameters, in the model's order.
    """

    label: str
    method: Literal["adamw", "muon"]
    level: int | None
    rate: float
    weight_decay: float
    names: tuple[str, ...]


def plan_groups(
    parameters: Mapping[str, Tensor], roles: Mapping[str, Role], config: Optimizer
) -> tuple[ParameterGroup, ...]:
    """Assign every parameter to exactly one group.

    Args:
        parameters: by name, each tensor once.
        roles: by the same names.
        config: the optimizer of the run.

    Raises:
        ValueError: a parameter without a role, a role without a parameter, one tensor under two names, or a
            `matrix` that is not 2-D.
    """
    _check_complete(parameters, roles)
    members: dict[tuple[str, Literal["adamw", "muon"], int | None], list[str]] = {}
    for name in parameters:
        role = roles[name]
        is_muon = isinstance(config, Muon) and role.kind == "matrix"
        method: Literal["adamw", "muon"] = "muon" if is_muon else "adamw"
        label = role.kind if role.level is None else f"level{role.level}/{role.kind}"
        members.setdefault((label, method, role.level), []).append(name)
    groups = []
    for (label, method, level), names in members.items():
        rate = config.adamw_rate if isinstance(config, Muon) and method == "adamw" else config.rate
        decay = config.weight_decay if roles[names[0]].kind == "matrix" else 0.0
        groups.append(ParameterGroup(label, method, level, rate, decay, tuple(names)))
    return tuple(groups)


def _check_complete(parameters: Mapping[str, Tensor], roles: Mapping[str, Role]) -> None:
    """Refuse a plan that would leave a parameter over or step one twice."""
    without_role = sorted(set(parameters) - set(roles))
    without_parameter = sorted(set(roles) - set(parameters))
    if without_role or without_parameter:
        raise ValueError(
            f"every parameter needs one role; parameters without a role: {without_role}, "
            f"roles without a parameter: {without_parameter}"
        )
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = seen.setdefault(id(parameter), name)
        if other != name:
            raise ValueError(f"{other} and {name} are one tensor; pass it once, or it would be stepped twice")
    for name, parameter in parameters.items():
        if roles[name].kind == "matrix" and parameter.ndim != 2:
            raise ValueError(f"{name} has role `matrix` but shape {tuple(parameter.shape)}; matrices are 2-D")
