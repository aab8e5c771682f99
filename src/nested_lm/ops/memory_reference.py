"""The self-modifying memories, one token at a time. Slow, float64-capable, and the judge of every faster backend.

Shapes: B batch, T tokens, H heads, M memories (5), K head width, E hidden width of a memory.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory import (
    DECAY,
    KEY,
    MEMORY,
    NORM_FLOOR,
    RATE,
    VALUE,
    GateReadout,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    WriteRule,
    add,
    damping,
    move_border,
    rate_limits,
    reset_rows,
    unit,
)


def apply_memory(weights: MemoryWeights, memory: int, x: Float[Tensor, "B H K"]) -> Float[Tensor, "B H K"]:
    """M(x) = x + W_out silu(W_in x) for one memory of every head (eq. 91)."""
    hidden = functional.silu(torch.einsum("bhek,bhk->bhe", weights.inner[:, :, memory], x))
    return x + torch.einsum("bhke,bhe->bhk", weights.outer[:, :, memory], hidden)


def inner_gradient(
    weights: MemoryWeights, memory: int, key: Float[Tensor, "B H K"], target: Float[Tensor, "B H K"]
) -> tuple[Float[Tensor, "B H E K"], Float[Tensor, "B H K E"]]:
    """Gradient of half the squared error of one memory with respect to its two layers.

    By automatic differentiation, so that the closed forms elsewhere are checked against something independent. The
    target is a constant here, but the outer gradient flows through it (ruling A4 in docs/equations.md).
    """
    with torch.enable_grad():
        inner = weights.inner[:, :, memory].clone()
        outer = weights.outer[:, :, memory].clone()
        if not inner.requires_grad:
            inner.requires_grad_()
        if not outer.requires_grad:
            outer.requires_grad_()
        hidden = functional.silu(torch.einsum("bhek,bhk->bhe", inner, key))
        error = key + torch.einsum("bhke,bhe->bhk", outer, hidden) - target
        loss = 0.5 * error.square().sum()
        grad_inner, grad_outer = torch.autograd.grad(loss, (inner, outer), create_graph=True)
    return grad_inner, grad_outer


def write_token(
    current: MemoryWeights,
    anchor: MemoryWeights,
    key: Float[Tensor, "B H K"],
    value: Float[Tensor, "B H K"],
    *,
    rate: Float[Tensor, "B H M"],
    decay: Float[Tensor, "B H"],
    rule: WriteRule,
) -> MemoryWeights:
    """Write one token into all memories by Delta Gradient Descent with decay (eq. 88).

    current: distance from the start, to be changed; anchor: full weights at the last border.
    """
    inner_layers, outer_layers = [], []
    keep = decay[..., None, None]
    for memory in range(current.inner.shape[2]):
        target = apply_memory(anchor, memory, value)  # eq. 84
        grad_inner, grad_outer = inner_gradient(anchor, memory, key, target)
        pre = torch.einsum("bhek,bhk->bhe", anchor.inner[:, :, memory], key)
        hidden = functional.silu(pre)
        direction = hidden / (hidden.square().sum(-1, keepdim=True) + NORM_FLOOR**2).sqrt()
        # How the answer moves when the weights move by the gradient: the product rule through both layers.
        gate = torch.sigmoid(pre)
        slope = gate * (1 + pre * (1 - gate))
        hidden_moved = slope * torch.einsum("bhek,bhk->bhe", grad_inner, key)
        moved = torch.einsum("bhke,bhe->bhk", anchor.outer[:, :, memory], hidden_moved)
        moved = moved + torch.einsum("bhke,bhe->bhk", grad_outer, hidden)
        squared = grad_inner.square().sum((-2, -1)) + grad_outer.square().sum((-2, -1))
        damped, _ = damping(moved, squared[..., None])
        inner, outer = current.inner[:, :, memory], current.outer[:, :, memory]
        step = rate[:, :, memory, None, None]
        new_inner = keep * inner - step * damped[..., None] * grad_inner
        new_outer = keep * outer - step * damped[..., None] * grad_outer
        if rule.erase != "none":
            old = torch.einsum("bhek,bhk->bhe", inner, key)
            new_inner = new_inner - step * torch.einsum("bhe,bhk->bhek", old, key)
        if rule.erase == "both":
            old = torch.einsum("bhke,bhe->bhk", outer, direction)
            new_outer = new_outer - step * torch.einsum("bhk,bhe->bhke", old, direction)
        inner_layers.append(new_inner)
        outer_layers.append(new_outer)
    return MemoryWeights(torch.stack(inner_layers, dim=2), torch.stack(outer_layers, dim=2))


def self_modify(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
) -> MemoryOutput:
    """Write every token into its head's memories and read them. Reference: one token at a time.

    Args:
        inputs: unit keys, values and queries, and the slow part of the gates.
        start: learned weights every stream starts from; gradients reach them through all reads and writes.
        readout: turns the outputs of the eta and alpha memories into gate logits.
        state: fast weights before the first token.
        rule: the write rule.
        position: tokens of the stream before the first one; says where the borders lie.
        resets: True where a token starts a document: its row's fast weights go back to the start.

    Returns:
        Reads of every token, the state after the last token, and the gates.

    Source: arXiv 2512.24695 eqs. 83-90. Deviations (rulings in docs/equations.md): borders are those strictly before
    the token (A1); decay and erase act on the distance from the start (A7); the eta and alpha memories are
    vector-valued like the others, read out by a learned vector (A10); inputs, values and queries are unit vectors
    (A13); writes are damped where they would overshoot, see `damping` (A6).
    """
    border, current = state
    limits = rate_limits(rule, inputs.rate)
    reads, rates, decays = [], [], []
    for t in range(inputs.key.shape[1]):
        if resets is not None:
            keep = (~resets[:, t]).to(current.inner.dtype)
            border, current = reset_rows(border, keep), reset_rows(current, keep)
        anchor = add(start, border)
        key = unit(apply_memory(anchor, KEY, inputs.key[:, t]))
        value = unit(apply_memory(anchor, VALUE, inputs.value[:, t]))
        rate_logit = (apply_memory(anchor, RATE, inputs.key[:, t]) * readout.rate).sum(-1)
        decay_logit = (apply_memory(anchor, DECAY, inputs.key[:, t]) * readout.decay).sum(-1)
        rate = torch.sigmoid(inputs.rate[:, t] + rate_logit)  # (B, H)
        decay = torch.sigmoid(inputs.decay[:, t] + decay_logit)
        written = write_token(current, anchor, key, value, rate=rate[..., None] * limits, decay=decay, rule=rule)
        seen = written if rule.read == "inclusive" else current
        reads.append(apply_memory(add(start, seen), MEMORY, inputs.query[:, t]))
        rates.append(rate * rule.rate_memory)
        decays.append(decay)
        current = written
        read_so_far = position + t + 1
        border = move_border(
            border,
            current,
            generators=read_so_far % rule.chunk_generators == 0,
            memory=read_so_far % rule.chunk == 0,
        )
    return MemoryOutput(
        torch.stack(reads, dim=1),
        MemoryState(border, current),
        torch.stack(rates, dim=1),
        torch.stack(decays, dim=1),
    )
