"""The gated delta rule and linear attention on the GPU kernels of flash-linear-attention (extra `gpu`).

The kernels round their operands to bfloat16 where the caller's tensors are of that type, and always keep the matrix in
float32; numbers agree with `delta_rule` within that rounding, not to the bit.

Shapes: B batch, T tokens, H heads, K key width, V value width, S documents of all rows.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nested_lm.errors import ConfigError, pip_install
from nested_lm.ops.delta_rule.chunked import DeltaRuleOutput


def is_installed() -> bool:
    """Whether flash-linear-attention and the compiler of its kernels are there. Imports neither."""
    return find_spec("fla") is not None and find_spec("triton") is not None


def check_usable(device: torch.device) -> None:
    """Refuse a place where the kernels cannot run.

    Raises:
        ConfigError: not installed, or no GPU; with the repair.
    """
    if not is_installed():
        raise ConfigError(
            "model.mixer.backend is `fla`, but flash-linear-attention is not installed; "
            f"run {pip_install('gpu')}, or set model.mixer.backend=torch"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"model.mixer.backend is `fla`, but the tensors are on `{device.type}`; the kernels of "
            "flash-linear-attention run on a CUDA GPU only: use one, or set model.mixer.backend=torch"
        )


def gated_delta_rule(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    rate: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
) -> DeltaRuleOutput:
    """`delta_rule.gated_delta_rule` by the Triton kernels.

    Raises:
        ConfigError: the kernels cannot run here.
    """
    check_usable(query.device)
    if log_decay is None:
        log_decay = torch.zeros_like(rate)
    kernel = _kernels("gated_delta_rule").chunk_gated_delta_rule
    per_token = (query, key, value, log_decay.float(), rate)
    if resets is None:
        reads, after = kernel(*per_token, scale=1.0, initial_state=state, output_final_state=True)
        return DeltaRuleOutput(reads, after)
    bounds, before, last = documents_in_one_row(resets, state)
    flat = (x.flatten(0, 1)[None] for x in per_token)
    reads, after = kernel(*flat, scale=1.0, initial_state=before, output_final_state=True, cu_seqlens=bounds)
    return DeltaRuleOutput(reads.view_as(value), after[last])


def linear_attention(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
) -> DeltaRuleOutput:
    """`delta_rule.linear_attention` by the Triton kernels.

    Raises:
        ConfigError: the kernels cannot run here.
    """
    check_usable(query.device)
    kernel = _kernels("simple_gla").chunk_simple_gla  # without a gate: linear attention
    if resets is None:
        reads, after = kernel(query, key, value, scale=1.0, initial_state=state, output_final_state=True)
        return DeltaRuleOutput(reads, after)
    bounds, before, last = documents_in_one_row(resets, state)
    flat = (x.flatten(0, 1)[None] for x in (query, key, value))
    reads, after = kernel(*flat, scale=1.0, initial_state=before, output_final_state=True, cu_seqlens=bounds)
    return DeltaRuleOutput(reads.view_as(value), after[last])


def documents_in_one_row(
    resets: Bool[Tensor, "B T"], state: Float[Tensor, "B H K V"]
) -> tuple[Int[Tensor, " S1"], Float[Tensor, "S H K V"], Int[Tensor, " B"]]:
    """Describe packed rows, laid behind each other, as documents of their own.

    Returns:
        Token at which each document begins, and the number of tokens; the matrix each begins with, which is the row's
        where the row goes on with an earlier document and empty otherwise; index of each row's last document.
    """
    batch, tokens = resets.shape
    begins = resets.clone()
    begins[:, 0] = True
    row, column = begins.nonzero(as_tuple=True)
    bounds = torch.cat([row * tokens + column, row.new_tensor([batch * tokens])])
    goes_on = ~resets[row, column]
    before = torch.where(goes_on[:, None, None, None], state[row], torch.zeros_like(state[row]))
    return bounds, before, begins.sum(dim=1).cumsum(dim=0) - 1


def _kernels(name: str) -> ModuleType:
    return import_module(f"fla.ops.{name}")
