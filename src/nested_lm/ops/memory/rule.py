"""The rule by which the self-modifying memories are written: every choice the paper leaves open, in one place.

Pure: the configuration checks itself with it, the operations follow it.

Source: arXiv 2512.24695 eqs. 83-93; arXiv 2501.00663 eq. 10.
"""

import math
from dataclasses import dataclass
from typing import Literal

MEMORIES = ("k", "eta", "alpha", "v", "q", "memory")
"""Order along the memory dimension: those that read the key input, then v, then q, then the one that is read out."""

ONE_BORDER = 2.0
"""Largest product of rate and chunk at which writes without the erase term are stable."""

INPUT_ALONE = 6.4
"""The same when only the first of two layers erases and the target is the memory's own answer: the largest product that
was measured to be bounded (docs/footguns.md)."""


@dataclass(frozen=True)
class WriteRule:
    """The choices the paper leaves open, and those its ablations switch.

    chunk, chunk_generators: tokens between two borders of `memory`, and of the generators (section 8.2 has two
        sizes). Keys, values and gates come from the generators' last border, and every memory's gradient and
        target from its own (eq. 90). One of the two divides the other.
    adapt: memories that exist and are written, in the order of MEMORIES; `memory` is always the last.
    rates: largest inner learning rate of each of them.
    depth: 2 for residual networks (eq. 91), 1 for matrices (eqs. 92-93).
    objective: half the squared error, or (depth 1) the negative inner product with the target (eq. 92).
    targets, targets_generators: what `memory`, and what the generators, are taught: each its own M(v) (eq. 84), or the
        value itself as in Titans.
    gradient: taken at the `border`; or (depth 1) at the `fresh` weights with the border's target; or
        `self_referential`, with the target from the fresh weights as well.
    erase: layers whose fast weights also forget along the written direction (the DGD term of eq. 88).
    erase_after_decay: whether the erase term meets what retention left, alpha (I - eta k k^T) as in Gated DeltaNet, or
        the weights before it, alpha I - eta k k^T as eq. 88 prints. The second has the eigenvalue alpha - eta, below -1
        for rates near 2.
    erase_since, erase_since_generators: what the erase term of `memory`, and of the generators, takes off: all that was
        written since the `start` (eq. 88), or only since the last `border`. The gradient of the squared error takes off
        what the border held as well, so that with `start` a write at rate 1 leaves value - old; with `border` it leaves
        value, the delta rule. At rates above 1 the gradient step has less room (`ops/memory/state.py`), and the erase
        term takes off the rest: at rate 2 both are the same. Taking off everything keeps generators near their start.
    decay_towards: what retention shrinks, the distance from the `start` or the whole weights (`zero`).
    momentum: whether gradients pass through a running `sum` of writes with its own decay m = mu m + b (Titans eq. 10),
        or through a running `mean`, m = mu m + (1 - mu) b, the same with (1 - mu) as a part of its rate; False:
        they do not. A sum multiplies the rate by up to 1 / (1 - mu), so that no rate is safe at every share mu that
        training may find; a mean is stable at each constant mu below 1 where writes without momentum are.
    read: whether a token reads the memory after (`inclusive`) or before (`exclusive`) its own write, or at the last
        `border` (the literal eq. 90).
    normalise: layer normalisation of the second layer's output inside a memory.
    unit_values: whether values are scaled to unit length.
    gates: one learning rate and retention a token for each `head`, or one for all heads of a `token` (eq. 88).
    damp: whether writes are damped where they would overshoot, see `damping`.
    rate_stretch: how far the sigmoid of the rate reaches beyond both of its ends before it is cut off there, as a share
        of the largest rate; above 0, writing nothing and the largest rate are reached exactly.
    rate_shares: how much of `rates` the heads reach, in as many groups of neighbouring heads. With (0.5, 1.0) and rates
        up to 2 the first half of the heads writes at rates up to 1, where overwriting is exact, and the second half up
        to 2, which state tracking needs.
    """

    chunk: int
    chunk_generators: int
    adapt: tuple[str, ...] = ("k", "eta", "alpha", "v", "memory")
    rates: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    depth: Literal[1, 2] = 2
    objective: Literal["l2", "dot"] = "l2"
    targets: Literal["generated", "values"] = "generated"
    targets_generators: Literal["generated", "values"] = "generated"
    gradient: Literal["border", "fresh", "self_referential"] = "border"
    erase: Literal["both", "input", "none"] = "both"
    erase_after_decay: bool = True
    erase_since: Literal["start", "border"] = "start"
    erase_since_generators: Literal["start", "border"] = "start"
    decay_towards: Literal["start", "zero"] = "start"
    momentum: Literal[False, "sum", "mean"] = False
    read: Literal["inclusive", "exclusive", "border"] = "inclusive"
    normalise: bool = False
    unit_values: bool = True
    gates: Literal["head", "token"] = "head"
    damp: bool = True
    rate_stretch: float = 0.0
    rate_shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what has no meaning, with the reason.

        Raises:
            ValueError: an impossible combination.
        """
        for wrong, reason in self._impossible():
            if wrong:
                raise ValueError(reason)

    def _impossible(self) -> tuple[tuple[bool, str], ...]:
        return (*self._impossible_shapes(), *self._unstable())

    def _unstable(self) -> tuple[tuple[bool, str], ...]:
        exact = self.depth == 1 and (self.gradient != "border" or self.alignment == 1)
        doubled = exact and self.objective == "l2" and self.erase != "none"
        above = [rate for rate, since in zip(self.rates, self.since_border, strict=False) if doubled and not since]
        limit = 1.0 if above and max(above) > 1.0 else 2.0
        useful = min([limit, *self._limits_of_own_answers().values()])
        grows = not self.unit_values and any(self.generated_targets) and not self.normalise
        return (
            (
                max(self.rates, default=0.0) > limit,
                f"rates {self.rates}: above {limit:g} a single write overshoots"
                + (" (gradient and erase term both take the old content off)" if limit == 1.0 else "")
                + f"; use rates up to {useful:.4g}"
                + (f" (up to {limit:g} where the targets are values)" if useful < limit else "")
                + (", or erase_since: border" if limit == 1.0 and self.gradient == "border" else ""),
            ),
            (
                not self.erase_after_decay and self.erase != "none" and max(self.rates, default=0.0) > 1.0,
                f"erase_after_decay false with rates {self.rates}: eq. 88's alpha I - eta k k^T has the eigenvalue "
                "alpha - eta, below -1 for a rate near 2 and any decay; use erase_after_decay: true, or rates up to 1",
            ),
            (
                grows,
                "values of any length with targets the memories generate feed back on themselves and diverge at every "
                "useful rate; use unit_values: true, or targets: values, or normalise: true",
            ),
        )

    def _impossible_shapes(self) -> tuple[tuple[bool, str], ...]:
        ordered = tuple(name for name in MEMORIES if name in self.adapt)
        linear = self.depth == 1
        return (
            (
                not self.rate_shares or min(self.rate_shares) <= 0.0 or max(self.rate_shares) != 1.0,
                f"rate_shares {self.rate_shares}: every share must be above 0, and the largest of them 1, which is the "
                f"whole of `rates`; use rate_shares: [0.5, 1.0] or [1.0], and lower `rates` to write less",
            ),
            (
                self.adapt != ordered or not self.adapt or self.adapt[-1] != "memory",
                f"adapt {self.adapt} must be some of {MEMORIES}, in this order, each once, with `memory`",
            ),
            (len(self.rates) != len(self.adapt), f"{len(self.rates)} rates for {len(self.adapt)} memories"),
            (
                self.objective == "dot" and not linear,
                "objective `dot` with a two-layer memory has no minimum: its writes grow without bound; use "
                "objective: l2, or depth: 1",
            ),
            (
                self.gradient != "border" and not linear,
                f"gradient `{self.gradient}` needs linear memories, where it stays a linear recurrence; use "
                "gradient: border, or depth: 1",
            ),
            (
                self.gradient == "self_referential" and not all(self.generated_targets),
                "gradient `self_referential` means that the target is M(v) at the fresh weights; use "
                "targets: generated, or gradient: fresh",
            ),
            (
                "border" in (self.erase_since, self.erase_since_generators)
                and (self.gradient != "border" or self.objective == "dot"),
                f"erase_since border brings a squared error's gradient of the border up to date; gradient "
                f"`{self.gradient}` with objective `{self.objective}` leaves nothing to do; use erase_since: start",
            ),
            (
                bool(self.momentum) and self.gradient != "border",
                "momentum needs gradients that are known before the chunk; use gradient: border",
            ),
            (self.normalise and linear, "normalise is a layer inside two-layer memories; use depth: 2"),
            (
                max(self.chunk, self.chunk_generators) % min(self.chunk, self.chunk_generators) != 0,
                f"chunk {self.chunk} and chunk_generators {self.chunk_generators} do not nest: one must be a multiple "
                "of the other",
            ),
        )

    def unbounded(self) -> str | None:
        """Say which memory grows without bound when one key is written again and again; None when none does.

        Not part of `__post_init__`: such a rule has a meaning, and models that were trained with it are read.

        Source: spec 11.6; measured in docs/stability_journal.md.
        """
        return (
            self._growing_undamped() or self._growing_momentum() or self._growing_answers() or self._growing_borders()
        )

    def _growing_undamped(self) -> str | None:
        """Growth of two-layer memories once training has made their second layer steep."""
        if self.damp or self.depth == 1:
            return None
        return (
            "damp false with two-layer memories: training makes their second layers steep, and an undamped write then "
            "overshoots at every useful rate; use damp: true, or depth: 1"
        )

    def _growing_momentum(self) -> str | None:
        """Growth through a running sum whose gradients are of a border some tokens ago.

        For linear memories without erase and long chunks it begins where the share that is kept passes about
        1 - rate x chunk / 2, for short ones later, and the share is learned. Two-layer memories without erase, as in
        Titans, are held by damping: they stay finite (docs/footguns.md has the figures).
        """
        held = self.objective == "dot" or self.alignment == 1 or (self.depth == 2 and self.erase == "none")
        if self.momentum != "sum" or held:
            return None
        return (
            f"momentum sum with erase {self.erase}, depth {self.depth} and chunks of several tokens: the share of the "
            "sum that is kept is learned, and near 1 it grows at every rate; use momentum: mean"
        )

    def _growing_answers(self) -> str | None:
        """Growth of linear memories whose targets are their own answers, M(v) to a value opposite to the key.

        Without erase the inner product adds M(v) to M(k) at every write. With the squared error a chunk of C writes at
        rate r multiplies what the key holds by a factor that must not fall below -1, at any rates up to the largest:

        * gradient at the border: 1 - 2 C r without erase; 3 (1 - r)^C - 2 with erase since the start, 2 (1 - r)^C - 1
          with erase since the border;
        * at the fresh weights, a write multiplies by 1 - 2 r without erase and by 1 - 3 r with it.
        """
        limits = self._limits_of_own_answers()
        for name, rate in zip(self.adapt, self.rates, strict=True):
            if rate > limits.get(name, math.inf):
                return (
                    f"depth 1, objective {self.objective}, gradient {self.gradient} and erase {self.erase} with rate "
                    f"{rate:g} of {name}, whose target is its own answer: writes of a value opposite to the key make "
                    f"what it holds grow; use rates up to {limits[name]:.4g}, or targets: values (and "
                    "targets_generators)"
                )
        return None

    def _limits_of_own_answers(self) -> dict[str, float]:
        """Largest stable rate of each linear memory that is taught its own answers, by name."""
        if self.depth == 2:
            return {}
        memories = zip(self.adapt, self.chunks, self.generated_targets, self.since_border, strict=True)
        return {
            name: self._limit_of_own_answers(chunk, since_border=since_border)
            for name, chunk, generated, since_border in memories
            if generated
        }

    def _limit_of_own_answers(self, chunk: int, *, since_border: bool) -> float:
        """Largest rate at which a linear memory that is taught its own answers is stable."""
        erases = self.erase != "none"
        if self.objective == "dot":
            return 1.0 if erases else 0.0
        if self.gradient != "border":
            return 2 / 3 if erases else 1.0
        if not erases:
            return 1 / chunk
        return 1.0 if since_border else 1 - 3 ** (-1 / chunk)

    def _growing_borders(self) -> str | None:
        """Growth because all writes of a chunk take the same error off.

        C writes of one key at gradients of one border turn what it held into 1 - C rate times that, without the erase
        term, or without it in the second layer where it takes off what was written since the border only: beyond 2 the
        coefficient is below -1. Damping does not help, it holds each write of the chunk by itself. The share of a mean
        may change from token to token: when a chunk at share 0 is followed by one at share 1, linear memories are
        stable up to half of that, while damping holds two-layer ones.
        """
        if self.objective != "l2" or self.gradient != "border" or self.erase == "both":
            return None
        most = ONE_BORDER / 2 if self.momentum and self.depth == 1 else ONE_BORDER
        memories = zip(self.adapt, self.rates, self.chunks, self.generated_targets, self.since_border, strict=True)
        for name, rate, chunk, generated, since_border in memories:
            if self.erase == "input" and not since_border:
                if self.depth == 2 and generated and chunk * rate > INPUT_ALONE:
                    return (
                        f"erase input with rate {rate:g} and chunk {chunk} of {name}, whose target is its own answer: "
                        f"its second layer erases nothing and grows; use rates up to {INPUT_ALONE / chunk:g}, "
                        "targets: values, or erase: both"
                    )
                continue
            if chunk * rate > most:
                return (
                    f"erase {self.erase} with rate {rate:g} and chunk {chunk} of {name}: {chunk} writes of one key at "
                    f"one border turn what it held into 1 - {chunk * rate:g} times that, and grow without bound; use "
                    f"rates up to {most / chunk:g}, chunks of up to {int(most / rate)}, or erase: both"
                )
        return None

    @property
    def alignment(self) -> int:
        """Tokens between two moments that are a border of every memory: where a document may start."""
        return max(self.chunk, self.chunk_generators)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of each memory, tokens between two of its borders."""
        return (self.chunk_generators,) * (len(self.adapt) - 1) + (self.chunk,)

    @property
    def since_border(self) -> tuple[bool, ...]:
        """Of each memory, whether its erase term leaves to the gradient what the border held."""
        erases = self.erase != "none"
        generators = erases and self.erase_since_generators == "border"
        return (generators,) * (len(self.adapt) - 1) + (erases and self.erase_since == "border",)

    @property
    def generated_targets(self) -> tuple[bool, ...]:
        """Of each memory, whether its target is its own answer to the value."""
        generators = self.targets_generators == "generated"
        return (generators,) * (len(self.adapt) - 1) + (self.targets == "generated",)

    @property
    def erased_layers(self) -> tuple[bool, bool]:
        """Whether the first and the second layer forget along the written direction."""
        return self.erase != "none", self.erase == "both"

    def index(self, name: str) -> int | None:
        """Place of a memory along the memory dimension; None when it does not adapt."""
        return self.adapt.index(name) if name in self.adapt else None

    @property
    def rate_memory(self) -> float:
        """Largest inner learning rate of `memory`."""
        return self.rates[-1]
