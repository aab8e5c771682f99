"""Deep optimizers as ordinary `torch.optim` classes, around the update rules of `ops/update_rules/registry.py`.

What torch has (`SGD`, `AdamW`, `Muon`) is torch's; what it lacks is here. The mathematics is in the rules, whose
docstrings give the equations.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from nested_lm.ops.update_rules import deep as update_rules_deep
from nested_lm.ops.update_rules import momentum as update_rules_momentum
from nested_lm.ops.update_rules import orthogonal as update_rules_orthogonal
from nested_lm.ops.update_rules.base import UpdateRule

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class RuleOptimizer(torch.optim.Optimizer):
    """Steps parameters by an update rule, with decoupled weight decay: p (1 - lr weight_decay), then the rule.

    A parameter group may have its own `lr`, `weight_decay` and settings of the rule. State is kept in float32 (float64
    for float64 parameters) whatever the type of parameters and gradients; the counter of steps is on the CPU. Values
    that are not finite are not looked for and spread, as in torch. Not for parameters that are sharded.

    params: tensors or groups. Rules for matrices take 2-D parameters only.
    rule: how a step is made.
    lr: step size, at least 0.
    weight_decay: share of a parameter that is taken away at each step, multiplied by `lr`; at least 0.
    """

    def __init__(self, params: Parameters, rule: UpdateRule[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        if rule.reads_inputs:
            raise ValueError(
                f"{type(rule).__name__} needs to know what each layer read; use the class of that name in "
                "optim/delta_gradient_descent.py, which is made from layers"
            )
        self._rule_type = type(rule)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **asdict(rule)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Raises:
            ValueError: a setting out of range, or a parameter that the rule cannot step.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                if not 0 <= group[name] < float("inf"):
                    raise ValueError(f"{type(self).__name__}: {name} is {group[name]!r}; it must be at least 0")
            rule = self._rule(group)
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise ValueError(f"{type(self).__name__} cannot step complex parameters; got {parameter.dtype}")
                if rule.shape == "matrix" and parameter.ndim != 2:
                    raise ValueError(
                        f"{type(self).__name__} steps 2-D parameters, and one has shape {tuple(parameter.shape)}; "
                        "give embeddings, biases and gains to AdamW"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again; called once, before the step.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                rule = self._rule(group)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(rule, parameter, lr=group["lr"], weight_decay=group["weight_decay"])
        return loss

    def state_layout(self, parameter: Tensor) -> dict[str, torch.Size]:
        """Names and shapes of the state that a parameter of this optimizer has after its first step."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        return {name: value.shape for name, value in self._initial(self._rule(group), parameter, "meta").items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from another optimizer's state, in the precision in which it was kept.

        Torch casts floating state to the type of its parameter, which would round a float32 momentum of bfloat16
        weights; so the values are put in again as they are.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                device = "cpu" if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device, copy=True)

    def _rule(self, group: dict[str, Any]) -> UpdateRule[Any]:
        """Make the rule with a group's settings."""
        return self._rule_type(**{field.name: group[field.name] for field in fields(self._rule_type)})

    @staticmethod
    def _initial(rule: UpdateRule[Any], parameter: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """State before the first step; its counter is a number on the CPU, so that reading it never waits."""
        state = rule.initial_state(torch.empty_like(parameter, device=device))._asdict()
        return {name: torch.zeros(()) if name == "step" else value for name, value in state.items()}

    def _step_one(self, rule: UpdateRule[Any], parameter: Tensor, *, lr: float, weight_decay: float) -> None:
        """Step one parameter in place."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use torch.optim.SparseAdam")
        state = self.state[parameter]
        if not state:
            state.update(self._initial(rule, parameter, parameter.device))
        decayed = parameter * (1 - lr * weight_decay) if weight_decay else parameter
        new, after = rule.update(decayed, gradient, _state_type(rule)(**state), rate=lr)
        parameter.copy_(new)
        state.update(after._asdict())


@cache
def _state_type(rule: UpdateRule[Any]) -> type[Any]:
    """Class of the states of a rule."""
    return type(rule.initial_state(torch.empty(1, 1, device="meta")))


class PreconditionedMomentum(RuleOptimizer):
    """Momentum of gradients divided by their running root mean square; parameters of any shape.

    settings: fields of `ops/update_rules/momentum.py:PreconditionedMomentum`.

    Source: arXiv 2512.24695 eqs. 46-47.
    """

    def __init__(self, params: Parameters, *, lr: float, weight_decay: float = 0.0, **settings: Any) -> None:
        rule = update_rules_momentum.PreconditionedMomentum(**settings)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)


class DeltaMomentum(RuleOptimizer):
    """Momentum that erases what it holds along each new gradient; 2-D parameters.

    settings: fields of `ops/update_rules/momentum.py:DeltaMomentum`.

    Source: arXiv 2512.24695 eqs. 48-49.
    """

    def __init__(self, params: Parameters, *, lr: float, weight_decay: float = 0.0, **settings: Any) -> None:
        super().__init__(params, update_rules_momentum.DeltaMomentum(**settings), lr=lr, weight_decay=weight_decay)


class DeepMomentum(RuleOptimizer):
    """Deep momentum gradient descent (DMGD): an MLP trained on the gradients makes the step; 2-D parameters.

    settings: fields of `ops/update_rules/deep.py:DeepMomentum`.

    Source: arXiv 2512.24695 eq. 50.
    """

    def __init__(self, params: Parameters, *, lr: float, weight_decay: float = 0.0, **settings: Any) -> None:
        super().__init__(params, update_rules_deep.DeepMomentum(**settings), lr=lr, weight_decay=weight_decay)


class M3(RuleOptimizer):
    """Multi-scale momentum Muon; 2-D parameters.

    settings: fields of `ops/update_rules/orthogonal.py:M3`, among them `mode`: `ema` to train with, `literal` for
        Algorithm 1 as printed.

    Source: arXiv 2512.24695 Algorithm 1.
    """

    def __init__(self, params: Parameters, *, lr: float, weight_decay: float = 0.0, **settings: Any) -> None:
        super().__init__(params, update_rules_orthogonal.M3(**settings), lr=lr, weight_decay=weight_decay)
