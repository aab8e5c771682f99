"""Which parameter gets which optimizer, by role and level: nothing left over, nothing twice.

The rule:

* weight decay acts on matrices (kind `matrix`) only; embeddings, vectors (norms, gates, convolutions) and the
  learned starts of the memories have none, because shrinking them changes what the model reads or where its
  memories start instead of limiting what a product can grow to;
* `adamw` steps everything with AdamW at `rate`;
* `muon` and `deep` step matrices with Muon or an update rule at `rate` and everything else with AdamW at `adamw_rate`;
* parameters of a Continuum Memory level keep their level, which says when they are stepped; an entry in `levels` gives
  its matrices a rule, a rate and a decay of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from nested_lm.config.train import AdamW, MatrixOptimizer, Muon, Optimizer
from nested_lm.config.update_rules import Muon as MuonRule
from nested_lm.config.update_rules import UpdateRule


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
    rule: how it is stepped; None: by AdamW.
    level: Continuum Memory level whose clock the group follows; None: every step.
    rate: peak learning rate.
    weight_decay: decoupled, multiplied by the rate.
    names: the parameters, in the model's order.
    """

    label: str
    rule: UpdateRule | None
    level: int | None
    rate: float
    weight_decay: float
    names: tuple[str, ...]

    @property
    def method(self) -> str:
        """Name of the optimizer that steps the group."""
        return "adamw" if self.rule is None else self.rule.kind


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
    members: dict[tuple[str, int | None], list[str]] = {}
    for name in parameters:
        role = roles[name]
        members.setdefault((role.kind, role.level), []).append(name)
    groups = []
    for (kind, level), names in members.items():
        label = kind if level is None else f"level{level}/{kind}"
        matrices = _matrix_optimizer(config, level) if kind == "matrix" else None
        if kind == "matrix" and matrices is None:  # AdamW, at its own rate
            assert isinstance(config, AdamW)
            groups.append(ParameterGroup(label, None, level, config.rate, config.weight_decay, tuple(names)))
        elif matrices is not None:
            rule, rate, decay = matrices.rule, matrices.rate, matrices.weight_decay
            groups.append(ParameterGroup(label, rule, level, rate, decay, tuple(names)))
        else:
            rate = config.rate if isinstance(config, AdamW) else config.adamw_rate
            groups.append(ParameterGroup(label, None, level, rate, 0.0, tuple(names)))
    return tuple(groups)


def _matrix_optimizer(config: Optimizer, level: int | None) -> MatrixOptimizer | None:
    """Find what steps the matrices of a level, or those outside levels; None: AdamW."""
    own = config.levels[level] if level is not None and config.levels else None
    if own is not None or isinstance(config, AdamW):
        return own
    rule = MuonRule(kind="muon", inertia=config.momentum) if isinstance(config, Muon) else config.rule
    return MatrixOptimizer(rule=rule, rate=config.rate, weight_decay=config.weight_decay)


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
