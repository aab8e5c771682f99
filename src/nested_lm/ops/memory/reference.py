"""The self-modifying memories, one token at a time. Slow, float64-capable, and the judge of every faster backend.

Inner gradients come from automatic differentiation, so that the closed forms elsewhere are checked against something
independent of them.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width of a memory.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    LAYER_NORM_FLOOR,
    NORM_FLOOR,
    GateReadout,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    add,
    check_momentum,
    damping,
    decay_base,
    move_border,
    rate_limits,
    rate_share,
    reset_rows,
    room_beside_erase,
    subtract,
    unit,
)


class OneMemory(NamedTuple):
    """Weights of one memory of every head, and the gain of its normalisation."""

    inner: Float[Tensor, "B H E K"]
    outer: Float[Tensor, "B H K E"]
    gain: Float[Tensor, "H K"] | None


class Token(NamedTuple):
    """What one token is written with."""

    key: Float[Tensor, "B H K"]
    value: Float[Tensor, "B H K"]
    rate: Float[Tensor, "B H"]  # before scaling by the largest rate
    decay: Float[Tensor, "B H"]
    momentum: Float[Tensor, "B H"] | None  # share of the running write that is kept


def pick(weights: MemoryWeights, memory: int, readout: GateReadout) -> OneMemory:
    """Take one memory."""
    gain = None if readout.gain is None else readout.gain[:, memory]
    return OneMemory(weights.inner[:, :, memory], weights.outer[:, :, memory], gain)


def answer(memory: OneMemory, x: Float[Tensor, "B H K"], rule: WriteRule) -> Float[Tensor, "B H K"]:
    """M(x): x + W_out silu(W_in x) (eq. 91), with layer normalisation before the sum where asked for, or W_in x."""
    if rule.depth == 1:
        return torch.einsum("bhek,bhk->bhe", memory.inner, x)
    branch = torch.einsum("bhke,bhe->bhk", memory.outer, hidden_units(memory, x))
    if memory.gain is not None:
        # In elementary operations: damping differentiates three times, which torch's layer_norm does not promise.
        centred = branch - branch.mean(-1, keepdim=True)
        branch = memory.gain * centred / (centred.square().mean(-1, keepdim=True) + LAYER_NORM_FLOOR).sqrt()
    return x + branch


def hidden_units(memory: OneMemory, x: Float[Tensor, "B H K"]) -> Float[Tensor, "B H E"]:
    """Hidden activations of a two-layer memory."""
    return functional.silu(torch.einsum("bhek,bhk->bhe", memory.inner, x))


def inner_gradient(
    memory: OneMemory, key: Float[Tensor, "B H K"], target: Float[Tensor, "B H K"], rule: WriteRule
) -> tuple[Float[Tensor, "B H E K"], Float[Tensor, "B H K E"]]:
    """Gradient of the inner loss of one memory with respect to its layers.

    The target is a constant here, but the outer gradient flows through it (ruling A4 in docs/equations.md).
    """
    with torch.enable_grad():
        inner, outer = (x if x.requires_grad else x.clone().requires_grad_() for x in (memory.inner, memory.outer))
        inner, outer = inner.clone(), outer.clone()
        found = answer(OneMemory(inner, outer, memory.gain), key, rule)
        squared, inner_product = 0.5 * (found - target).square().sum(), (found * target).sum()
        loss = squared if rule.objective == "l2" else -inner_product
        if rule.depth == 1:
            (grad_inner,) = torch.autograd.grad(loss, (inner,), create_graph=True)
            return grad_inner, torch.zeros_like(outer)
        grad_inner, grad_outer = torch.autograd.grad(loss, (inner, outer), create_graph=True)
    return grad_inner, grad_outer


def damp_factor(
    memory: OneMemory,
    key: Float[Tensor, "B H K"],
    gradient: tuple[Float[Tensor, "B H E K"], Float[Tensor, "B H K E"]],
    rate: Float[Tensor, "B H"],
    rule: WriteRule,
) -> Float[Tensor, "B H 1"]:
    """Factor of one memory's write; the answer's movement along the gradient comes from autodiff."""
    if rule.depth == 1 or not rule.damp:
        return torch.ones_like(key[..., :1])

    with torch.enable_grad():
        weights = [x if x.requires_grad else x.clone().requires_grad_() for x in (memory.inner, memory.outer)]
        probe = torch.zeros_like(key, requires_grad=True)
        # The gradient of <M(key), probe> is linear in the probe; its own gradient gives the Jacobian's other product.
        found = answer(OneMemory(weights[0], weights[1], memory.gain), key, rule)
        pulled = torch.autograd.grad(found, weights, probe, create_graph=True)
        (moved,) = torch.autograd.grad(pulled, probe, gradient, create_graph=True)
    squared = gradient[0].square().sum((-2, -1)) + gradient[1].square().sum((-2, -1))
    return damping(moved, squared[..., None], room_beside_erase(rate[..., None], rule))[0]


def write_memory(
    fast: OneMemory,
    momentum: tuple[Tensor, Tensor] | None,
    anchor: OneMemory,
    base: OneMemory,
    token: Token,
    *,
    limit: Tensor,
    since_border: bool,
    generated_target: bool,
    rule: WriteRule,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Write one token into one memory by Delta Gradient Descent with decay (eq. 88).

    fast: distance from the base, to be changed. anchor: full weights at the last border. base: what decay goes
        towards. limit: largest rate. since_border, generated_target: see `WriteRule`.

    Returns the new distance and momentum of both layers.
    """
    full = OneMemory(base.inner + fast.inner, base.outer + fast.outer, anchor.gain)
    at = anchor if rule.gradient == "border" else full
    target = token.value
    if generated_target:  # eq. 84
        target = answer(full if rule.gradient == "self_referential" else anchor, token.value, rule)
    gradient = inner_gradient(at, token.key, target, rule)
    factor = damp_factor(at, token.key, gradient, token.rate * limit, rule)[..., None]
    directions = [token.key]
    if rule.depth == 2:
        hidden = hidden_units(at, token.key)
        directions.append(hidden / (hidden.square().sum(-1, keepdim=True) + NORM_FLOOR**2).sqrt())
    step = (token.rate * limit)[..., None, None]
    keep = token.decay[..., None, None]
    new: list[Tensor] = []
    new_momentum: list[Tensor] = []
    for layer in range(2):
        old = (fast.inner, fast.outer)[layer]
        push = -step * factor * gradient[layer]
        if momentum is not None and token.momentum is not None:
            share = token.momentum[..., None, None]
            push = share * momentum[layer] + ((1 - share) * push if rule.momentum == "mean" else push)
            new_momentum.append(push)
        written = keep * old + push
        if layer < rule.depth and rule.erased_layers[layer]:
            met = keep * old if rule.erase_after_decay else old
            if since_border:
                held = (anchor.inner, anchor.outer)[layer] - (base.inner, base.outer)[layer]
                damped = rule.depth == 2 and rule.damp
                met = met - (room_beside_erase(step, rule) if damped else 1.0) * held
            along = torch.einsum("bhxy,bhy->bhx", met, directions[layer])
            written = written - step * torch.einsum("bhx,bhy->bhxy", along, directions[layer])
        new.append(written)
    return (new[0], new[1]), (new_momentum[0], new_momentum[1]) if new_momentum else None


def generate(
    inputs: MemoryInputs, t: int, anchor: MemoryWeights, readout: GateReadout, rule: WriteRule
) -> tuple[Token, Float[Tensor, "B H K"]]:
    """Let the memories generate key, value, rate and retention of token t (eq. 83), and its query."""

    def generated(name: str, x: Float[Tensor, "B H K"]) -> Float[Tensor, "B H K"]:
        index = rule.index(name)
        return x if index is None else answer(pick(anchor, index, readout), x, rule)

    def gate(name: str, slow: Float[Tensor, "B H"], vector: Tensor | None) -> Float[Tensor, "B H"]:
        logit = slow if vector is None else slow + (generated(name, inputs.key[:, t]) * vector).sum(-1)
        if rule.gates == "token":
            logit = logit.mean(dim=-1, keepdim=True).expand_as(logit)
        return logit

    key = generated("k", inputs.key[:, t])
    value = generated("v", inputs.value[:, t])
    query = generated("q", inputs.query[:, t])
    token = Token(
        unit(key) if "k" in rule.adapt else key,
        unit(value) if "v" in rule.adapt and rule.unit_values else value,
        rate_share(gate("eta", inputs.rate[:, t], readout.rate), rule),
        torch.sigmoid(gate("alpha", inputs.decay[:, t], readout.decay)),
        None if inputs.momentum is None else torch.sigmoid(inputs.momentum[:, t]),
    )
    return token, unit(query) if "q" in rule.adapt else query


def write_token(
    current: MemoryWeights,
    momentum: MemoryWeights | None,
    anchor: MemoryWeights,
    base: MemoryWeights,
    token: Token,
    readout: GateReadout,
    rule: WriteRule,
) -> tuple[MemoryWeights, MemoryWeights | None]:
    """Write one token into all memories. current: distance from the base."""
    limits = rate_limits(rule, token.rate)
    layers, momenta = [], []
    base = MemoryWeights(base.inner[None], base.outer[None])
    for memory in range(len(rule.adapt)):
        before = None if momentum is None else (momentum.inner[:, :, memory], momentum.outer[:, :, memory])
        parts = (pick(weights, memory, readout) for weights in (current, anchor, base))
        fast, at, to = parts
        new, moving = write_memory(
            fast,
            before,
            at,
            to,
            token,
            limit=limits[memory],
            since_border=rule.since_border[memory],
            generated_target=rule.generated_targets[memory],
            rule=rule,
        )
        layers.append(new)
        momenta.append(moving)
    written = MemoryWeights(*(torch.stack(layer, dim=2) for layer in zip(*layers, strict=True)))
    if momentum is None:
        return written, None
    return written, MemoryWeights(
        *(torch.stack(layer, dim=2) for layer in zip(*(m for m in momenta if m is not None), strict=True))
    )


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
        inputs: unit keys and queries, values, and the slow part of the gates.
        start: learned weights every stream starts from; gradients reach them through all reads and writes.
        readout: turns the outputs of the eta and alpha memories into gate logits.
        state: fast weights before the first token.
        rule: the write rule.
        position: tokens of the stream before the first one; says where the borders lie.
        resets: True where a token starts a document: its row's fast weights go back to the start.

    Returns:
        Reads of every token, the state after the last token, and the gates.

    Source: arXiv 2512.24695 eqs. 83-93. Deviations (rulings in docs/equations.md): borders are those strictly before
    the token (A1); the eta and alpha memories are vector-valued like the others, read out by a learned vector (A10);
    further ones are options of the rule.
    """
    check_momentum(rule, inputs, state)
    border, current, momentum = state
    base = decay_base(start, rule)
    memory = len(rule.adapt) - 1
    reads, rates, decays = [], [], []
    for t in range(inputs.key.shape[1]):
        if resets is not None:
            keep = (~resets[:, t]).to(current.inner.dtype)
            border, current = reset_rows(border, keep), reset_rows(current, keep)
            momentum = None if momentum is None else reset_rows(momentum, keep)
        anchor = add(start, border)
        token, query = generate(inputs, t, anchor, readout, rule)
        distance = subtract(add(start, current), base)
        written, momentum = write_token(distance, momentum, anchor, base, token, readout, rule)
        written = subtract(add(base, written), start)
        seen = {"inclusive": written, "exclusive": current, "border": border}[rule.read]
        reads.append(answer(pick(add(start, seen), memory, readout), query, rule))
        rates.append(token.rate * rule.rate_memory)
        decays.append(token.decay)
        current = written
        read_so_far = position + t + 1
        border = move_border(
            border,
            current,
            generators=read_so_far % rule.generator_chunk == 0,
            memory=read_so_far % rule.chunk == 0,
        )
    return MemoryOutput(
        torch.stack(reads, dim=1),
        MemoryState(border, current, momentum),
        torch.stack(rates, dim=1),
        torch.stack(decays, dim=1),
    )
