"""The optimizer of a run: each group of parameters by its own optimizer and on its own clock (CMS clock A)."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nested_lm.config.train import Optimizer
from nested_lm.config.update_rules import Muon, UpdateRule
from nested_lm.ops.update_rules.registry import make_rule
from nested_lm.optim.groups import ParameterGroup
from nested_lm.optim.level_clock import LevelClock
from nested_lm.optim.nested import NestedStarts, copy_of_starts, groups_of_starts
from nested_lm.optim.rule_optimizer import RuleOptimizer

_STATE = "state"  # first part of the names of optimizer tensors
_PENDING = "pending"  # first part of the names of gradients that wait for their level's clock
_START = "start"  # first part of the names of what nested levels go back to


class ClockedOptimizer:
    """Steps ordinary parameters at every step and each Continuum Memory level on its own clock.

    A level that is not due adds its (clipped) gradient to a buffer and keeps its weights. When its period has
    passed it is stepped once, on the SUM of the gradients of all steps since its last update. The buffers
    are state: a run stopped in the middle of a period continues with them. A level whose period is one step
    has no buffer and behaves like an ordinary parameter.

    A step that is skipped (see `skip`) contributes no gradient; a level that would have been due then goes on
    collecting until it is due again.

    restarts: each level but the slowest goes back to a start that is learned on the next slower clock whenever that
        clock ticks (nested wiring, see `NestedStarts`).
    step_whole: steps an optimizer that must see whole parameters, whose parameters may be cut over devices.

    Source: arXiv 2512.24695 eqs. 71-72, with an arbitrary optimizer for the error component. Deviation: periods
    are half-open, so that no token is counted twice.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: tuple[ParameterGroup, ...],
        clock: LevelClock,
        config: Optimizer,
        *,
        restarts: bool = False,
        step_whole: Callable[[torch.optim.Optimizer], object] = operator.methodcaller("step"),
    ) -> None:
        self._step_whole = step_whole
        self.parameters = dict(parameters)
        self.groups = groups
        self.clock = clock
        self._pending: dict[str, Tensor] = {}
        self._optimizers: dict[UpdateRule | None, torch.optim.Optimizer] = {}
        for rule in dict.fromkeys(group.rule for group in groups):
            own = [group for group in groups if group.rule == rule]
            self._optimizers[rule] = _create(rule, own, self.parameters, config)
        self._starts: NestedStarts | None = None
        if restarts:
            slower = groups_of_starts(groups, len(clock.periods))
            starts = copy_of_starts(self.parameters, slower)
            stepper = ClockedOptimizer(starts, slower, clock, config, step_whole=step_whole)
            self._starts = NestedStarts(self.parameters, stepper)

    def is_due(self, group: ParameterGroup, tokens_seen: int) -> bool:
        """Whether the group is stepped once `tokens_seen` tokens have passed."""
        return group.level is None or group.level in self.clock.due(tokens_seen)

    @torch.no_grad()
    def step(self, tokens_seen: int, multiplier: float) -> None:
        """Step every group that is due, on the gradients in `.grad`, and clear them.

        Args:
            tokens_seen: tokens of all steps up to and including this one.
            multiplier: share of each group's peak rate.
        """
        if self._starts is not None:
            self._starts.take_gradients()
        for group in self.groups:
            is_due = self.is_due(group, tokens_seen)
            for name in group.names:
                self._collect(name, is_due=is_due)
        for rule, optimizer in self._optimizers.items():
            for settings in optimizer.param_groups:
                settings["lr"] = settings["peak_rate"] * multiplier
            if rule is None:
                optimizer.step()  # AdamW treats every entry alike, so that a part of a tensor is as good as all of it
            else:
                self._step_whole(optimizer)
        if self._starts is not None:
            restarted = self._starts.step(tokens_seen, multiplier)
            for optimizer in self._optimizers.values():
                for name in restarted:
                    optimizer.state.pop(self.parameters[name], None)
        self.clear_gradients()

    def skip(self) -> None:
        """Drop the gradients of a step that must not be taken; weights, moments and buffers stay."""
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the gradients in `.grad`."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _collect(self, name: str, *, is_due: bool) -> None:
        """Move a gradient into its buffer, or, when due, the buffer into the gradient."""
        parameter, pending = self.parameters[name], self._pending
        if is_due:
            if name in pending:
                total = pending.pop(name)
                parameter.grad = total if parameter.grad is None else total.add_(parameter.grad)
        elif parameter.grad is not None:
            if name in pending:
                pending[name].add_(parameter.grad)
            else:
                pending[name] = parameter.grad
            parameter.grad = None

    def state_numel(self, step_tokens: int) -> int:
        """Count the entries that it keeps at most over a run whose steps have so many tokens, starts included."""
        layouts = self._layouts()
        total = 0
        for group in self.groups:
            waits = group.level is not None and self.clock.periods[group.level] > step_tokens
            for name in group.names:
                size = self.parameters[name].numel()
                if name in layouts:
                    total += sum(shape.numel() for shape in layouts[name].values())
                else:
                    total += size * (2 if group.rule is None else 1)  # AdamW's two moments, Muon's one
                total += size if waits else 0
        if self._starts is not None:
            total += self._starts.state_numel(step_tokens)
        return total

    def state_tensors(self) -> dict[str, Tensor]:
        """Name all optimizer state: `state/<parameter>/<key>` and `pending/<parameter>` (not copied).

        The starts of nested levels have the same names, and `weights/<parameter>`, below `start/`.
        """
        found = {f"{_PENDING}/{name}": buffer for name, buffer in self._pending.items()}
        for group in self.groups:
            state = self._optimizers[group.rule].state
            for name in group.names:
                for key, value in state.get(self.parameters[name], {}).items():
                    found[f"{_STATE}/{name}/{key}"] = value
        if self._starts is not None:
            found |= {f"{_START}/{name}": tensor for name, tensor in self._starts.state_tensors().items()}
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned, copied to each parameter's device.

        Raises:
            ValueError: a name that belongs to no parameter, or a name or shape that its optimizer does not have.
        """
        layouts = self._layouts()
        if self._starts is not None:
            own = {name.removeprefix(f"{_START}/"): t for name, t in tensors.items() if name.startswith(f"{_START}/")}
            self._starts.load_state_tensors(own)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_START}/")}
        states: dict[str, dict[str, Tensor]] = {}
        pending: dict[str, Tensor] = {}
        for full_name, tensor in tensors.items():
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.partition("/")
            if kind not in (_STATE, _PENDING) or name not in self.parameters or (kind == _STATE) != bool(key):
                raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of this model")
            parameter = self.parameters[name]
            if kind == _PENDING:
                _check_shape(full_name, tensor, parameter.shape)
                pending[name] = tensor.to(parameter.device, copy=True)
                continue
            device = parameter.device
            if name in layouts:
                if key not in layouts[name]:
                    raise ValueError(
                        f"optimizer state {full_name!r} is not kept by the optimizer of that parameter, which has "
                        f"{', '.join(layouts[name]) or 'none'}"
                    )
                _check_shape(full_name, tensor, layouts[name][key])
                device = torch.device("cpu") if key == "step" else device
            elif tensor.ndim:
                _check_shape(full_name, tensor, parameter.shape)
            states.setdefault(name, {})[key] = tensor.to(device, copy=True)
        for name, state in states.items():
            missing = sorted(set(layouts.get(name, ())) - set(state))
            if missing:
                raise ValueError(f"optimizer state of {name!r} lacks {', '.join(missing)}")
        self._pending = pending
        for group in self.groups:
            optimizer = self._optimizers[group.rule]
            for name in group.names:
                optimizer.state.pop(self.parameters[name], None)
                if name in states:
                    optimizer.state[self.parameters[name]] = states[name]

    def _layouts(self) -> dict[str, dict[str, torch.Size]]:
        """Names and shapes of the state of every parameter that an update rule steps."""
        found: dict[str, dict[str, torch.Size]] = {}
        for group in self.groups:
            optimizer = self._optimizers[group.rule]
            if isinstance(optimizer, RuleOptimizer):
                found |= {name: optimizer.state_layout(self.parameters[name]) for name in group.names}
        return found


def _check_shape(full_name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Refuse a tensor of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"optimizer state {full_name!r} has shape {tuple(tensor.shape)}, its parameter {tuple(shape)}")


def _create(
    rule: UpdateRule | None, groups: list[ParameterGroup], parameters: Mapping[str, nn.Parameter], config: Optimizer
) -> torch.optim.Optimizer:
    """Build the optimizer of all groups that share a rule."""
    settings: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.rate,
            "peak_rate": group.rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if rule is None:
        # Fused AdamW exists for the two device types the configuration allows, and is deterministic on CPU.
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
        return torch.optim.AdamW(settings, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused)
    if isinstance(rule, Muon):
        return torch.optim.Muon(
            settings,
            momentum=rule.inertia,
            nesterov=rule.look_ahead,
            ns_steps=rule.iterations,
            adjust_lr_fn="match_rms_adamw",
        )
    return RuleOptimizer(settings, make_rule(rule.kind, rule.settings), lr=0.0)  # every group has its own
