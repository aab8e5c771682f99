"""A call of the memories as launches of kernels: forward piece by piece, reads at once, backward in reverse.

Backward keeps the weights before each piece and the inputs, and computes the rest again: what the memories generate and
what reads of `memory` need in one launch for all pieces, inner gradients for a few pieces at a time.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width, S pieces, L lanes (B H),
C tokens of a tile, N numbers of a memory's layers (2 E K, or K K of a linear one).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import MemoryWeights, rate_limits, shares_of_heads
from nested_lm.ops.memory.triton.errors import errors_backward_kernel, errors_kernel
from nested_lm.ops.memory.triton.generate import generate_backward_kernel, generate_kernel
from nested_lm.ops.memory.triton.launch import launch
from nested_lm.ops.memory.triton.momentum import momentum_backward_kernel, momentum_kernel
from nested_lm.ops.memory.triton.read import read_backward_kernel, read_kernel
from nested_lm.ops.memory.triton.solve import solve_backward_kernel, solve_kernel

TOGETHER = 8
"""Pieces whose inner gradients backward computes again in one launch: more take more room, fewer more launches."""

ROLES = 5
"""What a token is written and read with: key, rate, decay, value, query."""


class Call(NamedTuple):
    """What a call is, beside its tensors."""

    rule: WriteRule
    batch: int
    tokens: int
    heads: int
    width: int
    hidden: int
    position: int  # tokens of the stream before the first one
    low: bool  # products round their operands to bfloat16
    dtype: torch.dtype  # of sums, solves and states

    @property
    def step(self) -> int:
        """Tokens of a piece."""
        return min(self.rule.chunk, self.rule.generator_chunk)

    @property
    def first(self) -> int:
        """Tokens until the first border."""
        return self.step - self.position % self.step

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return 1 + max(0, -(-(self.tokens - self.first) // self.step))

    @property
    def lanes(self) -> int:
        """Rows times heads."""
        return self.batch * self.heads

    @property
    def memories(self) -> int:
        """Number of memories."""
        return len(self.rule.adapt)

    @property
    def layers(self) -> int:
        """Layers of a memory."""
        return self.rule.depth

    @property
    def numbers(self) -> int:
        """Weights of a memory."""
        return self.layers * self.hidden * self.width

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return max(16, triton.next_power_of_2(min(self.step, self.tokens)))

    @property
    def shifted(self) -> int:
        """Position less whole alignments."""
        return self.position % self.rule.alignment

    def begin(self, piece: int) -> int:
        """First token of a piece."""
        return 0 if piece == 0 else self.first + (piece - 1) * self.step

    def border_slot(self, token: int, chunk: int, *, resets: bool) -> int:
        """Slot of the weights at the last border before a token; `tiles.border_slot` in Python."""
        at = (self.shifted + token) // chunk * chunk - self.shifted
        if at > 0:
            return (at - self.first) // self.step + 2
        return int(at == 0 and resets and self.shifted == 0)

    def where(self) -> tuple[int, ...]:
        """The numbers from which kernels find pieces."""
        return (self.shifted, self.first, self.step)

    def chunks(self) -> tuple[int, int, int]:
        """Tokens between borders of the generators, of `memory`, and of all."""
        return (self.rule.generator_chunk, self.rule.chunk, self.rule.alignment)

    def sizes(self) -> dict[str, Any]:
        """Sizes and number types, which kernels are compiled for."""
        acc = {torch.float32: tl.float32, torch.float64: tl.float64}[self.dtype]
        return {
            **{"M": self.memories, "C": self.tile, "K": self.width, "E": self.hidden, "LAYERS": self.layers},
            **{"LOW": self.low, "ACC": acc},
        }

    def gates(self) -> dict[str, Any]:
        """How logits become gates."""
        return {"STRETCH": self.rule.rate_stretch, "ALL_HEADS": self.rule.gates == "token"}

    def places(self) -> dict[str, int]:
        """Number of each generator, -1 without it."""
        names = {"PLACE_K": "k", "PLACE_ETA": "eta", "PLACE_ALPHA": "alpha", "PLACE_V": "v", "PLACE_Q": "q"}
        found = {place: self.rule.index(name) for place, name in names.items()}
        return {place: -1 if index is None else index for place, index in found.items()}

    def inner_gradients(self) -> dict[str, Any]:
        """How writes follow from keys and values."""
        rule = self.rule
        return {
            **{"GENERATED": rule.targets == "generated", "GENERATED_OTHERS": rule.targets_generators == "generated"},
            **{"PRODUCT": rule.objective == "dot", "DAMP": rule.damp, "ERASES": rule.erase != "none"},
        }

    def erasing(self) -> dict[str, Any]:
        """What writes take off."""
        rule = self.rule
        inner, outer = rule.erased_layers
        since = rule.since_border
        return {
            **{"ERASE_INNER": inner, "ERASE_OUTER": outer if rule.depth == 2 else inner},
            **{"SINCE_BORDER": since[-1], "SINCE_BORDER_OTHERS": since[0] if len(since) > 1 else since[-1]},
            **{"AFTER_DECAY": rule.erase_after_decay, "DAMP": rule.damp and rule.depth == 2},
        }

    def reading(self) -> dict[str, bool]:
        """What reads see."""
        return {"INCLUSIVE": self.rule.read == "inclusive", "AT_BORDER": self.rule.read == "border"}

    def layer_launches(self) -> list[tuple[int, dict[str, int]]]:
        """Programs a memory, and constants, of the launches that serve both layers."""
        if self.layers == 1:
            return [(1, {"LAYER": 0, "X": self.width, "Y": self.width})]
        if self.hidden == self.width:
            return [(2, {"LAYER": -1, "X": self.width, "Y": self.width})]
        inner, outer = (self.hidden, self.width), (self.width, self.hidden)
        return [(1, {"LAYER": layer, "X": x, "Y": y}) for layer, (x, y) in enumerate((inner, outer))]

    def warps(self) -> int:
        """Warps of a program: tiles of products must fit into registers."""
        return 16 if max(self.width, self.hidden) > 64 else 8


class Given(NamedTuple):
    """Tensors of a call."""

    key: Float[Tensor, "B T H K"]
    value: Float[Tensor, "B T H K"]
    query: Float[Tensor, "B T H K"]
    rate: Float[Tensor, "B T H"]
    decay: Float[Tensor, "B T H"]
    momentum: Float[Tensor, "B T H"] | None
    readout_rate: Float[Tensor, "H K"] | None
    readout_decay: Float[Tensor, "H K"] | None
    start: Float[Tensor, "H M N"]
    resets: Tensor | None


class Made(NamedTuple):
    """What the memories generate, and what a layer's writes need of `memory` for its reads."""

    key: Float[Tensor, "B T H K"]
    value: Float[Tensor, "B T H K"]
    query: Float[Tensor, "B T H K"]
    rate: Float[Tensor, "B T H"]  # logits
    decay: Float[Tensor, "B T H"]
    write_inner: Float[Tensor, "B T H E"]
    write_outer: Float[Tensor, "B T H K"]
    direction: Float[Tensor, "B T H E"]


def packed(weights: MemoryWeights) -> Float[Tensor, "... M N"]:
    """Both layers of each memory behind one another."""
    return torch.cat([weights.inner.flatten(-2), weights.outer.flatten(-2)], dim=-1).contiguous()


def unpacked(weights: Float[Tensor, "... M N"], like: MemoryWeights) -> MemoryWeights:
    """Both layers of each memory, as new tensors."""
    size = like.inner.shape[-2] * like.inner.shape[-1]
    inner, outer = weights[..., :size], weights[..., size:]
    shapes = (*weights.shape[:-1], *like.inner.shape[-2:]), (*weights.shape[:-1], *like.outer.shape[-2:])
    return MemoryWeights(inner.reshape(shapes[0]).clone(), outer.reshape(shapes[1]).clone())


class Forward:
    """Launches of a call's forward pass.

    weights, momenta: slots of the weights (S + 2, B, H, M, N), see `tiles`; momenta None without momentum.
    """

    def __init__(self, call: Call, given: Given, weights: Tensor, momenta: Tensor | None) -> None:
        self.call, self.given, self.weights, self.momenta = call, given, weights, momenta
        self.reach = shares_of_heads(call.rule, given.rate[:, 0])
        self.limits = rate_limits(call.rule, given.rate)
        self.made = self._room()

    def _room(self) -> Made:
        given, adapt = self.given, self.call.rule.adapt
        token = given.key.new_empty
        shape = given.key.shape
        wide, narrow = (*shape[:3], self.call.hidden), shape
        two = self.call.layers == 2
        return Made(
            torch.empty_like(given.key) if "k" in adapt else given.key,
            torch.empty_like(given.value) if "v" in adapt else given.value,
            torch.empty_like(given.query) if "q" in adapt else given.query,
            torch.empty_like(given.rate) if "eta" in adapt else given.rate,
            torch.empty_like(given.decay) if "alpha" in adapt else given.decay,
            token(wide),
            token(narrow if two else (1,)),
            token(wide if two else (1,)),
        )

    def scratch(self, pieces: int, memories: int) -> tuple[Tensor, Tensor]:
        """Room for what is known of writes, and for their directions."""
        call = self.call
        numbers = call.width + (call.hidden if call.layers == 2 else 0)
        new = self.given.key.new_empty
        directions = call.hidden if call.layers == 2 else 1
        shape = (pieces, call.lanes, memories, call.tile)
        return new((*shape, numbers)), new((*shape, directions))

    def generate(self, piece: int, pieces: int) -> None:
        """Let the memories generate what some pieces are written with."""
        call, given, made = self.call, self.given, self.made
        if call.memories == 1:
            return
        some = next((x for x in (given.readout_rate, given.readout_decay) if x is not None), given.start)
        readouts = [some if x is None else x for x in (given.readout_rate, given.readout_decay)]
        arguments = (
            *given[:5], *readouts, given.start, self.weights, given.resets, *made[:5],
            call.lanes, call.tokens, call.heads, piece, *call.where(), call.rule.generator_chunk, call.rule.alignment,
        )  # fmt: skip
        constants = {**call.places(), "UNIT_VALUES": call.rule.unit_values, **call.sizes()}
        grid = (call.lanes, call.memories - 1, pieces)
        launch(generate_kernel, grid, arguments, constants, call.warps())

    def errors(self, piece: int, pieces: int, memory: int, memories: int, known: Tensor, direction: Tensor) -> None:
        """Inner gradients of some memories and pieces."""
        call, given, made = self.call, self.given, self.made
        arguments = (
            made.key, made.value, made.rate, self.reach, self.limits, given.start, self.weights, given.resets,
            known, direction, call.lanes, call.tokens, call.heads, piece, memory, *call.where(), *call.chunks(),
        )  # fmt: skip
        constants = {**call.inner_gradients(), **call.gates(), **call.sizes()}
        grid = (call.lanes, memories, pieces)
        launch(errors_kernel, grid, arguments, constants, call.warps())

    def write(
        self, piece: int, pieces: int, memory: int, memories: int, known: Tensor, direction: Tensor, *, carry: bool
    ) -> None:
        """Writes of some memories and pieces; carry: and the weights after the piece."""
        call, given, made = self.call, self.given, self.made
        traced = (made.write_inner, made.write_outer, made.direction)
        numbers = (call.lanes, call.tokens, call.heads, piece, memory, memories, *call.where())
        common = {**call.gates(), "CARRY": carry, **call.sizes()}
        for programs, constants in call.layer_launches():
            grid = (call.lanes, memories * programs, pieces)
            before = (made.key, direction, known, made.rate, made.decay)
            constants = common | constants
            after: tuple[Any, ...]
            if self.momenta is None:
                after = (self.reach, self.limits, self.weights, given.resets, *traced, *numbers, *call.chunks())
                kernel, constants = solve_kernel, constants | call.erasing()
            else:
                after = (given.momentum, self.reach, self.limits, self.weights, self.momenta, given.resets, *traced)
                after = (*after, *numbers, call.rule.alignment)
                kernel, constants = momentum_kernel, constants | {"MEAN": call.rule.momentum == "mean"}
            launch(kernel, grid, (*before, *after), constants, call.warps())

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Reads of all pieces, and the gates."""
        call, given, made = self.call, self.given, self.made
        found = (torch.empty_like(given.key), torch.empty_like(given.rate), torch.empty_like(given.rate))
        arguments = (
            made.key, made.query, made.rate, made.decay, given.momentum, self.reach, self.limits, given.start,
            self.weights, self.momenta, given.resets, *made[5:], *found,
            call.lanes, call.tokens, call.heads, *call.where(), call.rule.chunk, call.rule.alignment,
        )  # fmt: skip
        constants = {"MEAN": call.rule.momentum == "mean", **call.gates(), **call.reading(), **call.sizes()}
        launch(read_kernel, (call.lanes, call.pieces), arguments, constants, call.warps())
        return found

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Write all pieces, and read."""
        call = self.call
        room = self.scratch(1, call.memories)
        for piece in range(call.pieces):
            self.generate(piece, 1)
            self.errors(piece, 1, 0, call.memories, *room)
            self.write(piece, 1, 0, call.memories, *room, carry=True)
        return self.read()

    def again(self) -> None:
        """Compute again what reads need."""
        call = self.call
        self.generate(0, call.pieces)
        if call.rule.read != "border":
            room = self.scratch(call.pieces, 1)
            self.errors(0, call.pieces, call.memories - 1, 1, *room)
            self.write(0, call.pieces, call.memories - 1, 1, *room, carry=False)
        else:
            for x in self.made[5:]:
                x.zero_()


class Backward:
    """Launches of a call's backward pass.

    g_border, g_weights, g_momenta: gradients of the state after the call; they become those of the state before it.
    """

    def __init__(
        self,
        forward: Forward,
        sent: tuple[Tensor, ...],
        g_border: Tensor,
        g_weights: Tensor,
        g_momenta: Tensor | None,
    ) -> None:
        self.forward, self.call = forward, forward.call
        self.g_reads, self.g_rate_out, self.g_decay_out = sent
        self.g_border, self.g_weights, self.g_momenta = g_border, g_weights, g_momenta
        call, given = self.call, forward.given
        key, rate = given.key, given.rate
        self.g_key = key.new_empty(3, *key.shape)
        self.g_value, self.g_query = torch.empty_like(key), torch.empty_like(key)
        self.g_rate, self.g_decay = torch.empty_like(rate), torch.empty_like(rate)
        self.g_momentum = key.new_empty(call.memories * call.layers + 1, *rate.shape)
        self.g_readout = key.new_zeros(2, call.batch, call.heads, call.width)
        self.g_start = torch.zeros_like(g_weights)
        # of reads
        wide = (*key.shape[:3], call.hidden)
        self.hidden = key.new_empty(wide if call.layers == 2 else (1,))
        self.g_hidden = key.new_empty(wide)
        self.read_query, self.read_key = torch.empty_like(key), torch.empty_like(key)
        self.read_write_inner = key.new_empty(wide)
        self.read_write_outer = torch.empty_like(key)
        self.read_direction = key.new_empty(wide)
        self.read_log_decay = torch.empty_like(rate)
        # of a piece
        lanes, memories, tile = call.lanes, call.memories, call.tile
        self.sent_key = key.new_empty(lanes, memories, tile, call.width)
        self.sent_value = torch.empty_like(self.sent_key)
        self.g_direction = key.new_empty(lanes, memories, tile, call.hidden)
        self.room = key.new_empty(lanes, memories, 2, tile, tile + max(call.width, call.hidden))
        self.sent_share = key.new_zeros(lanes, memories, 3, tile)
        self.sent_log_decay = key.new_zeros(lanes, memories, 2, tile)

    def read(self) -> None:
        """Backward of all reads."""
        call, forward = self.call, self.forward
        given, made = forward.given, forward.made
        arguments = (
            made.key, made.query, made.decay, given.momentum, given.start, forward.weights, forward.momenta,
            given.resets, *made[5:], self.g_reads, self.hidden, self.g_hidden, self.read_query, self.read_key,
            self.read_write_inner, self.read_write_outer, self.read_direction, self.read_log_decay, self.g_momentum[-1],
            call.lanes, call.tokens, call.heads, *call.where(), call.rule.chunk, call.rule.alignment,
        )  # fmt: skip
        constants = {"MEAN": call.rule.momentum == "mean", "ALL_HEADS": call.rule.gates == "token"}
        constants |= {**call.reading(), **call.sizes()}
        launch(read_backward_kernel, (call.lanes, call.pieces), arguments, constants, call.warps())

    def write(self, piece: int, known: Tensor, direction: Tensor) -> None:
        """Backward of a piece's writes; `known` becomes its gradient."""
        call, forward = self.call, self.forward
        given, made = forward.given, forward.made
        read = (
            made.query, self.hidden, self.g_hidden, self.g_reads,
            self.read_write_inner, self.read_write_outer, self.read_direction,
        )  # fmt: skip
        sent = (self.sent_key, self.g_direction, self.sent_share, self.sent_log_decay)
        numbers = (call.lanes, call.tokens, call.heads, piece, *call.where(), *call.chunks())
        gradients = (self.g_start, self.g_border, self.g_weights)
        common = {**call.gates(), **call.sizes()}
        for programs, constants in call.layer_launches():
            grid = (call.lanes, call.memories * programs)
            before = (made.key, direction, known, made.rate, made.decay)
            constants = common | constants
            after: tuple[Any, ...] = (forward.reach, forward.limits, forward.weights)
            if forward.momenta is None:
                after = (*after, given.resets, *read, *sent, self.room, *gradients)
                kernel, constants = solve_backward_kernel, constants | call.erasing() | call.reading()
            else:
                after = (given.momentum, *after, forward.momenta, given.resets, *read, *sent, self.g_momentum)
                after = (*after, *gradients, self.g_momenta)
                kernel, constants = momentum_backward_kernel, constants | {"MEAN": call.rule.momentum == "mean"}
            launch(kernel, grid, (*before, *after, *numbers), constants, call.warps())

    def errors(self, piece: int, known: Tensor, direction: Tensor) -> None:
        """Backward of a piece's inner gradients."""
        call, forward = self.call, self.forward
        given, made = forward.given, forward.made
        arguments = (
            made.key, made.value, made.rate, forward.reach, forward.limits, given.start, forward.weights, given.resets,
            known, direction, self.g_direction, self.sent_key, self.sent_value, self.sent_share,
            self.g_start, self.g_border, self.g_weights,
            call.lanes, call.tokens, call.heads, piece, *call.where(), *call.chunks(),
        )  # fmt: skip
        constants = {**call.inner_gradients(), **call.gates(), **call.sizes()}
        grid = (call.lanes, call.memories)
        launch(errors_backward_kernel, grid, arguments, constants, call.warps())

    def generate(self, piece: int) -> None:
        """Backward of what the memories generate."""
        call, forward = self.call, self.forward
        given, made = forward.given, forward.made
        some = next((x for x in (given.readout_rate, given.readout_decay) if x is not None), given.start)
        readouts = [some if x is None else x for x in (given.readout_rate, given.readout_decay)]
        arguments = (
            *given[:3], made.rate, made.decay, *readouts, given.start, forward.weights, given.resets,
            forward.reach, forward.limits, self.sent_key, self.sent_value, self.sent_share, self.sent_log_decay,
            self.read_key, self.read_query, self.read_log_decay, self.g_rate_out, self.g_decay_out,
            self.g_key, self.g_value, self.g_query, self.g_rate, self.g_decay, self.g_readout,
            self.g_start, self.g_border, self.g_weights,
            call.lanes, call.tokens, call.heads, piece, *call.where(), call.rule.generator_chunk, call.rule.alignment,
        )  # fmt: skip
        constants = {**call.places(), "UNIT_VALUES": call.rule.unit_values, **call.gates(), **call.sizes()}
        launch(generate_backward_kernel, (call.lanes, ROLES), arguments, constants, call.warps())

    def run(self) -> None:
        """Go through the pieces in reverse."""
        call, forward = self.call, self.forward
        forward.again()
        self.read()
        room = forward.scratch(min(TOGETHER, call.pieces), call.memories)
        for last in range(call.pieces, 0, -TOGETHER):
            first = max(0, last - TOGETHER)
            forward.errors(first, last - first, 0, call.memories, *room)
            for piece in reversed(range(first, last)):
                known, direction = room[0][piece - first], room[1][piece - first]
                self.write(piece, known, direction)
                self.errors(piece, known, direction)
                self.generate(piece)


class SelfModify(torch.autograd.Function):
    """One call."""

    @staticmethod
    def forward(ctx: Any, call: Call, resets: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Tensors: inputs, start, readouts, border, current, momentum."""
        inputs, readouts = tensors[:6], tensors[8:10]
        start, border, current = (MemoryWeights(*tensors[i : i + 2]) for i in (6, 10, 12))  # type: ignore[arg-type]
        given = Given(*inputs, *readouts, packed(start), resets)  # type: ignore[call-arg, arg-type]
        weights = given.key.new_empty(call.pieces + 2, call.batch, call.heads, call.memories, call.numbers)
        weights[0], weights[1] = packed(border), packed(current)
        momenta = None
        if tensors[14] is not None:
            momenta = torch.empty_like(weights)
            momenta[1] = packed(MemoryWeights(*tensors[14:16]))  # type: ignore[arg-type]
        found = Forward(call, given, weights, momenta).run()
        ctx.call, ctx.like = call, MemoryWeights(*(x.new_empty(x.shape, device="meta") for x in start))
        ctx.save_for_backward(*given, weights, momenta)
        after = _final_border(call, weights, resets), weights[-1], *(() if momenta is None else (momenta[-1],))
        return (*found, *(x for part in after for x in unpacked(part, start)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of them."""
        call: Call = ctx.call
        *given, weights, momenta = ctx.saved_tensors
        forward = Forward(call, Given(*given), weights, momenta)
        g_border = packed(MemoryWeights(*grads[3:5]))
        g_weights = packed(MemoryWeights(*grads[5:7]))
        g_momenta = None if momenta is None else packed(MemoryWeights(*grads[7:9]))
        for chunk, which in zip(call.chunks(), (slice(0, -1), slice(-1, None)), strict=False):
            if call.border_slot(call.tokens, chunk, resets=given[-1] is not None) == call.pieces + 1:
                g_weights[:, :, which] += g_border[:, :, which]
                g_border[:, :, which] = 0
        sent = tuple(grad.contiguous() for grad in grads[:3])
        back = Backward(forward, sent, g_border, g_weights, g_momenta)
        back.run()
        like: MemoryWeights = ctx.like
        g_readout = [None if x is None else found.sum(0) for x, found in zip(given[6:8], back.g_readout, strict=True)]
        g_momentum = None if momenta is None else back.g_momentum.sum(0)
        g_state = [x for part in (back.g_border, back.g_weights) for x in unpacked(part, like)]
        g_running = (None, None) if back.g_momenta is None else unpacked(back.g_momenta, like)
        g_inputs = (back.g_key.sum(0), back.g_value, back.g_query, back.g_rate, back.g_decay, g_momentum)
        g_start = unpacked(back.g_start.sum(0), like)
        return (None, None, *g_inputs, *g_start, *g_readout, *g_state, *g_running)


def _final_border(call: Call, weights: Tensor, resets: Tensor | None) -> Tensor:
    """Weights of each memory at its last border."""
    found = []
    for chunk, which in zip(call.chunks(), (slice(0, -1), slice(-1, None)), strict=False):
        slot = call.border_slot(call.tokens, chunk, resets=resets is not None)
        part = weights[slot][:, :, which]
        begin = call.begin(slot - 1) if slot > 0 else -1
        if resets is not None and 0 <= begin < call.tokens and (call.shifted + begin) % call.rule.alignment == 0:
            part = part * (resets[:, begin] == 0).to(part.dtype)[:, None, None, None]
        found.append(part)
    return torch.cat(found, dim=2)
