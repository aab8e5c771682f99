"""Delta Gradient Descent as a `torch.optim` optimizer of linear layers.

Shapes: T rows read since the last step, O outputs, I inputs (one more with a bias).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nested_lm.ops.update_rules.base import working_dtype
from nested_lm.ops.update_rules.proximal import proximal_step_from_moments


class DeltaGradientDescent(torch.optim.Optimizer):
    """Takes the proximal step of each layer's rows: W' = argmin sum_t 1/2 |W x_t - u_t|^2 + 1/(2 lr) |W - W_0|^2.

    u_t is minus the gradient of the loss for the layer's answer. Beside the ordinary gradient this needs X^T X of what
    the layer read, which hooks add up (float32) while backward passes; forward passes that are not followed by a
    backward pass, and repeated ones of activation checkpointing, do not count. Accumulation over several backward
    passes works; gradients may be clipped before the step. A bias is stepped as the weight of a constant input 1.

    X^T X belongs to the gradients: clear both with this optimizer's `zero_grad`, not the model's. Layers must not
    change their input in place. Call `remove_hooks` to give the layers back.

    layers: linear layers, each once; one parameter group each.
    lr: step size, at least 0. A step never goes beyond its targets, but the targets move with the weights: where the
        loss has curvature c in the answers, steps along x converge if lr' |x|^2 (1 + c) < 2, so for c < 1 at any lr.
    reduction: how the loss joins the rows of a layer. `sum`: eq. 56 over all rows; `mean`: the loss is a mean over
        the rows, and so is the objective.
    weight_decay: share of a weight that is taken away before the step, multiplied by `lr`; at least 0.

    Source: arXiv 2512.24695 eqs. 56-57 with rate' = rate / (1 + rate |x|^2) (the paper prints 1 + rate), all rows
        solved together.
    """

    def __init__(
        self, layers: Iterable[nn.Linear], *, lr: float, reduction: Literal["sum", "mean"], weight_decay: float = 0.0
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"DeltaGradientDescent: reduction is {reduction!r}; it must be 'sum' or 'mean'")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"DeltaGradientDescent: {name} is {value!r}; it must be at least 0")
        layers = list(layers)
        strangers = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, nn.Linear)})
        if strangers:
            raise ValueError(f"DeltaGradientDescent steps nn.Linear layers only; got {', '.join(strangers)}")
        groups: list[dict[str, Any]] = [{"params": list(layer.parameters(recurse=False))} for layer in layers]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "reduction": reduction})
        self._hooks = [layer.register_forward_hook(self._watch) for layer in layers]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every layer that has a gradient, and forget what its rows were.

        Args:
            closure: clears, then computes the loss and its gradients; called once, before the step.

        Raises:
            RuntimeError: a layer has a gradient and none of its rows were seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["params"][0].grad is not None:
                    self._step_one(group)
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the rows they came from."""
        super().zero_grad(set_to_none)
        self._forget()

    def remove_hooks(self) -> None:
        """Stop watching the layers; the optimizer cannot step any more."""
        for hook in self._hooks:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, with sums in the precision in which they were kept (torch would cast them)."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _watch(self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the rows of a forward pass once its backward pass reaches the layer."""
        if output.requires_grad:
            read = inputs[0].detach()
            output.register_hook(lambda _: self._add(layer, read))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add(self, layer: nn.Linear, read: Tensor) -> None:
        """Add X^T X of some rows."""
        rows = read.flatten(0, -2).to(working_dtype(layer.weight))
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        state = self.state[layer.weight]
        with torch.autocast(rows.device.type, enabled=False):
            moment = rows.mT @ rows
        state["second_moment"] = state["second_moment"] + moment if "second_moment" in state else moment
        state["rows"] = state.get("rows", torch.zeros(())) + rows.shape[0]

    def _step_one(self, group: dict[str, Any]) -> None:
        """Step weight and bias of one layer in place."""
        parameters = group["params"]
        state = self.state.get(parameters[0], {})
        if "second_moment" not in state:
            raise RuntimeError(
                f"a layer of weight shape {tuple(parameters[0].shape)} has a gradient, but no backward pass through it "
                "was seen since the last step or zero_grad; make the optimizer before the forward pass"
            )
        moment = state["second_moment"]
        if group["reduction"] == "mean":
            moment = moment / state["rows"].to(moment.device)
        columns = [p if p.ndim == 2 else p.unsqueeze(1) for p in parameters]
        slopes = [p.grad if p.ndim == 2 else p.grad.unsqueeze(1) for p in parameters]
        old = torch.cat(columns, dim=1) * (1 - group["lr"] * group["weight_decay"])
        new = proximal_step_from_moments(old, moment, torch.cat(slopes, dim=1), rate=group["lr"])
        for parameter, value in zip(parameters, torch.split(new, [c.shape[1] for c in columns], dim=1), strict=True):
            parameter.copy_(value.reshape(parameter.shape))

    def _forget(self) -> None:
        """Drop the rows."""
        self.state.clear()
