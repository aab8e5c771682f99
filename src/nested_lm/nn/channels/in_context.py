"""Levels that are written while the model reads: clock B of the Continuum Memory System.

Every sequence has its own fast copy of a level's MLPs: the learned weights plus a distance. After each period of the
level the copy takes one step on the gradient of the next-token loss of exactly that period's tokens.

Shapes: B batch, T tokens, n tokens since the last border, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from nested_lm.config.channels import ChannelSection, InContext
from nested_lm.nn.channels.in_context_trees import (
    Rows,
    Rule,
    add_trees,
    choose,
    from_host,
    initial_pending,
    initial_trees,
    step_trees,
    watched,
)
from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.loss import IGNORED_TARGET, token_losses
from nested_lm.nn.state import ModelOutput, StreamState, iterate_tensors, map_tensors
from nested_lm.ops.update_rules.registry import make_rule

Fast = tuple[dict[int, MLPDistance], ...]
"""Distances of the fast copies: one entry a block, by level."""

Predict = Callable[[Tensor, Tensor | None, StreamState, Fast], ModelOutput]
"""Forward pass over tokens, document starts, a state and fast copies."""


class LevelState(NamedTuple):
    """One level's fast copies: a distance from the learned weights for each of its layers.

    pending: gradients since the level's last write, summed, with what the layers read where the inner optimizer wants
        to know; empty for the fastest level, which has none to keep.
    rule: state of the inner optimizer.
    """

    distance: tuple[MLPDistance, ...]
    pending: tuple[MLPDistance, ...]
    rule: Any


class InContextState(NamedTuple):
    """Fast copies, and what a period that is not over yet needs to be differentiated later.

    levels: those that write, fastest first.
    border: the blocks' states where the running segment began.
    window: its tokens so far; a full one waits for the next token, the target of its last prediction. An empty one has
        nothing to wait with: the stream stands at its start, or where `border` is and all before it was written.
    starts: rows in which a document starts at its first token.
    segments: segments of the row's document that have been written.
    """

    levels: tuple[LevelState, ...]
    border: tuple[Any, ...]
    window: Int[Tensor, "B n"]
    starts: Bool[Tensor, " B"]
    segments: Int[Tensor, " B"]


@dataclass(frozen=True)
class WrittenLevel:
    """A level that writes. ratio: segments between two writes. layers: blocks in which it has an MLP."""

    level: int
    ratio: int
    rate: float
    rule: Rule
    layers: tuple[int, ...]


class InContextWriter:
    """Runs a model over segments of the shortest period and writes the levels at their borders.

    With C the period of a level, its fast copy steps on the sum of the gradients of C predictions, all taken at the
    copy as it was before (faster levels may move in between). The prediction at token i has token i + 1 as its
    target, so the step is taken when the first token of the next segment is there: the output at that token is the
    first to use it, and depends on nothing after that token. A prediction across a document start does not count; an
    inner optimizer that reads inputs (DGD) sees those of all C tokens.

    The inner gradient does not cross segment borders: memories, caches and convolution tails from before the border
    are constants to it. The gradient of training crosses them as without clock B. `first_order` takes a write for a
    constant; `second_order` differentiates it as well.

    Where one call holds a whole segment and the token after it, the pass that made the outputs is differentiated.
    Otherwise the segment is run again from its border, once, when it is complete: the state keeps its tokens and the
    blocks' states at the border. Both give the same numbers.

    channel: levels and their clocks. mlps: of each block, by level.

    Source: arXiv 2512.24695 eq. 71 within a context, eq. 72 for nested levels. Deviations: periods are half-open;
    the rate is a number, not a function of the token; norms have no fast copy.
    """

    def __init__(self, channel: ChannelSection, mlps: Sequence[dict[int, nn.Module]]) -> None:
        shared = channel.in_context_settings
        assert shared is not None
        self.settings: InContext = shared
        self.nested = channel.restarts_levels
        self.period = channel.alignment
        self.mlps = tuple(mlps)
        self.levels = tuple(
            WrittenLevel(
                level,
                writes.period_tokens // self.period,
                writes.rate,
                make_rule(writes.rule.kind, writes.rule.settings),
                tuple(layer for layer, found in enumerate(mlps) if level in found),
            )
            for level, writes in enumerate(channel.writes)
            if writes is not None
        )

    def initial_state(self, batch_size: int, layers: tuple[Any, ...], device: torch.device) -> InContextState:
        """Fast copies at the learned weights, before the first token."""
        return InContextState(
            tuple(self.initial_level(level, batch_size) for level in self.levels),
            layers,
            torch.zeros(batch_size, 0, dtype=torch.long, device=device),
            torch.zeros(batch_size, dtype=torch.bool, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device),
        )

    def initial_level(self, level: WrittenLevel, batch_size: int) -> LevelState:
        """One level's fast copies at the learned weights."""
        zero = tuple(self.mlps[layer][level.level].initial_distance(batch_size) for layer in level.layers)
        pending = initial_pending(level.rule, zero) if level.ratio > 1 else ()
        return LevelState(zero, pending, initial_trees(level.rule, zero))

    def learned(self, level: WrittenLevel) -> tuple[tuple[Tensor, Tensor], ...]:
        """Learned weights that a level's copies are distances from."""
        return tuple(self.mlps[layer][level.level].learned() for layer in level.layers)

    def fast_copies(self, state: StreamState) -> Fast:
        """The fast copies that a state holds, by block."""
        assert isinstance(state.in_context, InContextState)
        return self.spread(tuple(level.distance for level in state.in_context.levels))

    def spread(self, copies: "Copies") -> Fast:
        """Sort the copies by block."""
        fast: Fast = tuple({} for _ in self.mlps)
        for level, distances in zip(self.levels, copies, strict=True):
            for layer, distance in zip(level.layers, distances, strict=True):
                fast[layer][level.level] = distance
        return fast

    def read(
        self, predict: Predict, tokens: Int[Tensor, "B T"], starts: Bool[Tensor, "B T"] | None, state: StreamState
    ) -> ModelOutput:
        """Predict the token after each token, writing at every border on the way.

        starts: where documents start, on the host, see `nn/starts.py`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "levels that are written in context need gradients of their own, which torch.inference_mode() "
                "forbids; use torch.no_grad()"
            )
        reading = _Reading(self, predict, state, restarts=starts is not None)
        count = tokens.shape[1]
        begins = sorted({0, *range(-state.position % self.period, count, self.period)})
        for begin, end in zip(begins, [*begins[1:], count], strict=True):
            part = tokens[:, begin:end]
            if (state.position + begin) % self.period == 0:
                reading.open_segment(part[:, 0], None if starts is None else starts[:, begin])
            reading.pass_over(part, is_last=end == count)
        return reading.output()


Copies = tuple[tuple[MLPDistance, ...], ...]
"""Distances by level, then by the level's layers."""


class _Aliases(NamedTuple):
    """Fast copies under names of their own. leaves: of the graph behind the names, when it begins with them."""

    copies: Copies
    leaves: list[Tensor]


class _Pass(NamedTuple):
    """Forward pass over a whole segment, kept until its last target is there. by: what it is differentiated by."""

    logits: Tensor
    by: _Aliases


class _Reading:
    """One call of a writer: the stream between two of its tokens."""

    def __init__(self, writer: InContextWriter, predict: Predict, state: StreamState, *, restarts: bool) -> None:
        memory = state.in_context
        assert isinstance(memory, InContextState)
        self.writer, self.predict = writer, predict
        self.is_trained = torch.is_grad_enabled()
        self.is_second_order = self.is_trained and writer.settings.meta_gradient == "second_order"
        self.now = replace(state, in_context=None)
        self.levels, self.window, self.starts = memory.levels, memory.window, memory.starts
        self.border = replace(self.now, layers=memory.border, position=state.position - memory.window.shape[1])
        rows = memory.window.shape[0]
        # Without a second document every row has the same age, which needs no look at the device.
        is_uniform = not restarts and not state.packed
        self.ages = [self.border.position // writer.period] * rows if is_uniform else memory.segments.tolist()
        # Whether a document starts at the segment's first token. The segment of an earlier call knows on the device.
        self.may_start = state.packed and memory.window.shape[1] > 0 and bool(self.starts.any())
        self.kept: _Pass | None = None
        self.outputs: list[ModelOutput] = []

    def open_segment(self, first: Int[Tensor, " B"], starts: Bool[Tensor, " B"] | None) -> None:
        """Write what the last segment taught, now that its last target is there, and begin another at `first`."""
        device = first.device
        if self.window.shape[1] == self.writer.period:
            target = first if starts is None else first.masked_fill(starts.to(device), IGNORED_TARGET)
            self.ages = [age + 1 for age in self.ages]
            self._write(self._gradients(target))
        self.starts = torch.zeros_like(self.starts) if starts is None else starts.to(device)
        self.may_start = starts is not None and bool(starts.any())
        if starts is not None and self.writer.settings.lifetime == "document":
            self.ages = [0 if start else age for age, start in zip(self.ages, starts.tolist(), strict=True)]
            self.levels = self._restarted(self.levels, [from_host(starts.tolist(), device)] * len(self.levels))
        self.border, self.window, self.kept = self.now, self.window[:, :0], None

    def pass_over(self, part: Int[Tensor, "B n"], *, is_last: bool) -> None:
        """Run the model over tokens of one segment."""
        opens = self.window.shape[1] == 0
        self.window = torch.cat([self.window, part], dim=1)
        resets = self._resets(part.shape[1]) if opens else None
        copies = tuple(level.distance for level in self.levels)
        # The pass over a whole segment is the one to differentiate, if this call brings its last target.
        if part.shape[1] == self.writer.period and not is_last:
            by = self._alias(copies)
            with torch.enable_grad():
                output = self.predict(part, resets, self.now, self.writer.spread(by.copies))
            self.kept = _Pass(output.logits, by)
            if not self.is_trained:
                output = ModelOutput(output.logits.detach(), output.state.detach(), output.stats)
        else:
            output = self.predict(part, resets, self.now, self.writer.spread(copies))
        self.now = output.state
        self.outputs.append(output)

    def output(self) -> ModelOutput:
        """What the call returns. Statistics are means over its tokens."""
        logits = torch.cat([output.logits for output in self.outputs], dim=1)
        stats = {
            name: sum(output.stats[name] * output.logits.shape[1] for output in self.outputs) / logits.shape[1]
            for name in self.outputs[0].stats
        }
        for level, state in zip(self.writer.levels, self.levels, strict=True):
            squares = [tensor.detach().float().square().sum((-2, -1)) for tensor in iterate_tensors(state.distance)]
            stats[f"in_context/level{level.level}"] = torch.stack(squares).sum(0).sqrt().mean()
        ages = torch.tensor(self.ages, device=logits.device)
        memory = InContextState(self.levels, self.border.layers, self.window, self.starts, ages)
        return ModelOutput(logits, replace(self.now, in_context=memory), stats)

    def _resets(self, tokens: int) -> Bool[Tensor, "B n"] | None:
        """Document starts of the first tokens of the segment."""
        if not self.may_start:
            return None
        resets = torch.zeros(self.starts.shape[0], tokens, dtype=torch.bool, device=self.starts.device)
        resets[:, 0] = self.starts
        return resets

    def _alias(self, copies: Copies) -> _Aliases:
        """Give the fast copies another name, so that the inner gradient sees their use in this segment only.

        The copy of a slow level is one tensor over several segments, and through the blocks' states at the border
        it also reaches this one; by its own name that path is left out.
        """
        leaves: list[Tensor] = []

        def rename(tensor: Tensor) -> Tensor:
            if not (self.is_second_order and tensor.requires_grad):
                tensor = tensor.detach().requires_grad_()
                leaves.append(tensor)
            return tensor.view_as(tensor)

        with torch.enable_grad():
            named = map_tensors(copies, rename)
        pairs = zip(self.writer.levels, named, strict=True)
        return _Aliases(tuple(watched(c, leaves) if level.rule.reads_inputs else c for level, c in pairs), leaves)

    def _gradients(self, last_target: Int[Tensor, " B"]) -> Copies:
        """Gradient of the sum of the segment's losses, for each level and layer, a row each."""
        run = self.kept or self._run_again()
        targets = torch.cat([self.window[:, 1:], last_target[:, None]], dim=1)
        with torch.enable_grad():
            loss = token_losses(run.logits, targets).sum()
        copies = run.by.copies
        found = iter(
            torch.autograd.grad(
                loss, iterate_tensors(copies), retain_graph=self.is_trained, create_graph=self.is_second_order
            )
        )
        for leaf in run.by.leaves:
            leaf.requires_grad_(False)  # else the backward pass of training would fill its `.grad`
        return map_tensors(copies, lambda _: next(found))

    def _run_again(self) -> _Pass:
        """Run the model over the segment from its border, for its gradient."""
        by = self._alias(tuple(level.distance for level in self.levels))
        border = self.border if self.is_second_order else self.border.detach()
        with torch.enable_grad():
            output = self.predict(
                self.window, self._resets(self.window.shape[1]), border, self.writer.spread(by.copies)
            )
        return _Pass(output.logits, by)

    def _write(self, gradients: Copies) -> None:
        """Step the levels that are due, and add to what the others wait with."""
        device = self.window.device
        due = [from_host([age % level.ratio == 0 for age in self.ages], device) for level in self.writer.levels]
        self.levels = tuple(
            self._stepped(level, state, gradient, rows)
            for level, state, gradient, rows in zip(self.writer.levels, self.levels, gradients, due, strict=True)
        )
        if self.writer.nested:
            self.levels = self._restarted(self.levels, [*due[1:], False])

    def _stepped(
        self, level: WrittenLevel, state: LevelState, gradient: tuple[MLPDistance, ...], due: Rows
    ) -> LevelState:
        """Take one step in the rows that are due."""
        total = gradient if level.ratio == 1 else add_trees(state.pending, gradient)
        if due is False:
            return LevelState(state.distance, total, state.rule)
        learned = self.writer.learned(level) if level.rule.reads_inputs else ()
        distance, rule = step_trees(level.rule, level.rate, state.distance, total, state.rule, learned)
        if not self.is_second_order:
            distance, rule = map_tensors((distance, rule), Tensor.detach)
        pending = () if level.ratio == 1 else choose(due, map_tensors(total, torch.zeros_like), total)
        return LevelState(choose(due, distance, state.distance), pending, choose(due, rule, state.rule))

    def _restarted(self, levels: tuple[LevelState, ...], rows: Sequence[Rows]) -> tuple[LevelState, ...]:
        """Set levels back to the learned weights, each in its own rows."""
        size = self.window.shape[0]
        return tuple(
            state if where is False else choose(where, self.writer.initial_level(level, size), state)
            for level, state, where in zip(self.writer.levels, levels, rows, strict=True)
        )
