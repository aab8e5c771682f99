"""What computes a matrix-valued recurrence: this project's chunk form, or the kernels of flash-linear-attention.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nested_lm.config.baselines import Backend
from nested_lm.nn.layers import once_only
from nested_lm.ops.delta_rule import chunked as delta_rule
from nested_lm.ops.delta_rule import fla as delta_rule_fla
from nested_lm.ops.delta_rule.chunked import DeltaRuleOutput


def run_recurrence(
    name: Literal["gated_delta_rule", "linear_attention"],
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
    backend: Backend,
    recompute: bool,
    differentiable_twice: bool,
    **gates: Float[Tensor, "B T H"] | None,
) -> DeltaRuleOutput:
    """Run a function of `ops.delta_rule`, or its twin on the kernels.

    recompute: backward computes the recurrence again instead of keeping what it needs.
    differentiable_twice: gradients will be differentiated again, which `auto` leaves to the chunk form.
    gates: rate and log_decay of the delta rule.

    Raises:
        ConfigError: backend `fla` where its kernels cannot run or serve.
    """
    function: Callable[..., DeltaRuleOutput] = getattr(delta_rule, name)
    if differentiable_twice and backend == "fla":
        raise once_only(backend)
    if not differentiable_twice and uses_kernels(backend, query.device):
        function = getattr(delta_rule_fla, name)
        query, key, value = (x.to(_kernel_dtype(x)) for x in (query, key, value))
    elif query.dtype != (wide := torch.promote_types(query.dtype, torch.float32)) and not is_autocast(query):
        # The chunk form solves triangular systems, and writes add up in the matrix.
        query, key, value, state = (x.to(wide) for x in (query, key, value, state))
        gates = {name: None if gate is None else gate.to(wide) for name, gate in gates.items()}
    if recompute and torch.is_grad_enabled():
        return checkpoint(
            function,
            query,
            key,
            value,
            state=state,
            resets=resets,
            use_reentrant=False,
            preserve_rng_state=False,
            **gates,
        )
    return function(query, key, value, state=state, resets=resets, **gates)


def uses_kernels(backend: Backend, device: torch.device) -> bool:
    """Whether the kernels are asked for; with `auto`, whether they can run."""
    return backend == "fla" or (backend == "auto" and device.type == "cuda" and delta_rule_fla.is_installed())


def _kernel_dtype(x: Tensor) -> torch.dtype:
    """Under autocast its dtype, as for any product of matrices."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return torch.is_autocast_enabled(x.device.type)
