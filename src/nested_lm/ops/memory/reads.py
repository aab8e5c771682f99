"""Reading `memory` at every token of a call at once, from what its chunks wrote.

Shapes: B batch, T tokens, S chunks, C tokens of a chunk, H heads, K head width, E hidden width of a memory.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.chunk import Chunk, normalised_rows
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryWeights
from nested_lm.ops.memory.writes import Spread, shifted, spread_of_momentum

PER_TOKEN = 8
"""Members of a trace that have one entry a token; the next two have one a piece; the rest exist with momentum only."""

CLOSED = PER_TOKEN + 2
"""Members of a trace without momentum."""


class Trace(NamedTuple):
    """What reads of `memory` need: its queries, its weights before each piece and every write. Distances are from
    what decay goes towards. The members of the second layer are empty for linear memories.
    """

    query: Float[Tensor, "B H T K"]
    inner_key: Float[Tensor, "B H T K"]
    inner_write: Float[Tensor, "B H T E"]
    outer_key: Float[Tensor, "B H T E"]
    outer_write: Float[Tensor, "B H T K"]
    log_kept: Float[Tensor, "B H T"]  # log of the retention since the piece began
    rate: Float[Tensor, "B H T"]
    decay: Float[Tensor, "B H T"]
    inner: Float[Tensor, "B H S E K"]
    outer: Float[Tensor, "B H S K E"]
    log_momentum: Float[Tensor, "B H T"] | None = None
    inner_push: Float[Tensor, "B H T E"] | None = None
    outer_push: Float[Tensor, "B H T K"] | None = None
    inner_momentum: Float[Tensor, "B H S E K"] | None = None
    outer_momentum: Float[Tensor, "B H S K E"] | None = None

    def closed(self) -> tuple[Tensor, ...]:
        """Give the members that exist without momentum."""
        return tuple(self[:CLOSED])  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: list["Trace"]) -> "Trace":
        """Put the traces of single pieces behind each other."""
        members = zip(*parts, strict=True)
        return cls(*(None if some[0] is None else torch.cat(some, dim=2) for some in members))  # type: ignore[arg-type]

    def section(self, tokens: slice, pieces: slice) -> "Trace":
        """Take neighbouring pieces of equal length, their tokens split into (S, C)."""
        count = pieces.stop - pieces.start

        def of_tokens(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            part = x[:, :, tokens]
            return part.reshape(*part.shape[:2], count, part.shape[2] // count, *part.shape[3:])

        def of_pieces(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, pieces]

        per_piece = (PER_TOKEN, PER_TOKEN + 1, len(self) - 2, len(self) - 1)
        return Trace(*(of_pieces(x) if i in per_piece else of_tokens(x) for i, x in enumerate(self)))  # type: ignore[arg-type]


def trace_chunk(chunk: Chunk, seen: MemoryWeights, momentum: MemoryWeights | None, rule: WriteRule) -> Trace:
    """Keep what reads need of one chunk. seen: weights that reads of it start from."""
    made = chunk.made
    inner = chunk.inner[-1]
    nothing = made.key[..., :0]
    outer_key = outer_write = nothing
    outer_push = None
    if chunk.errors is not None:
        outer_key = chunk.errors.direction[:, :, -1]
        outer_write = chunk.outer[-1].write[:, :, -1]
        outer_push = chunk.outer[-1].pushed
    trace = Trace(
        made.query,
        made.key,
        inner.write[:, :, -1],
        outer_key,
        outer_write,
        chunk.decays.log_kept,
        made.rate * rule.rate_memory,
        made.log_decay.exp(),
        seen.inner[:, :, -1:],
        seen.outer[:, :, -1:],
    )
    if momentum is None or inner.pushed is None:
        return trace
    return trace._replace(
        log_momentum=made.log_momentum,
        inner_push=inner.pushed[:, :, -1],
        outer_push=nothing if outer_push is None else outer_push[:, :, -1],
        inner_momentum=momentum.inner[:, :, -1:],
        outer_momentum=momentum.outer[:, :, -1:],
    )


class _Seen(NamedTuple):
    """How much of earlier content a read sees: of the weights before the piece, of each write, of the momentum."""

    faded: Float[Tensor, "B H S C 1"]
    ratio: Float[Tensor, "B H S C C"]
    spread: Spread | None


def _what_is_seen(trace: Trace, rule: WriteRule) -> _Seen:
    log_kept = trace.log_kept
    inclusive = rule.read == "inclusive"
    log_seen = log_kept if inclusive else functional.pad(log_kept[..., :-1], (1, 0))
    diagonal = 0 if inclusive else -1
    ratio = (log_seen[..., :, None] - log_kept[..., None, :]).tril(diagonal).exp().tril(diagonal)
    faded = log_seen.exp()[..., None]
    if trace.log_momentum is None:
        return _Seen(faded, ratio, None)
    spread = spread_of_momentum(log_kept, trace.log_momentum, rule)
    matrix, first = spread.matrix.squeeze(-3), spread.first.squeeze(-3)
    if not inclusive:
        matrix, first = shifted(matrix), shifted(first)
    return _Seen(faded, ratio, spread._replace(matrix=matrix, first=first))


def read_chunks(
    base_inner: Float[Tensor, "H E K"],
    base_outer: Float[Tensor, "H K E"],
    gain: Float[Tensor, "H K"] | None,
    trace: Trace,
    rule: WriteRule,
) -> Float[Tensor, "B H S C K"]:
    """Read `memory` at every token of every piece, each at its own moment.

    trace: its per-token members with the tokens split into (S, C).
    """
    seen = None if rule.read == "border" else _what_is_seen(trace, rule)

    def layer(
        x: Tensor, base: Tensor, before: Tensor, keys: Tensor, writes: Tensor, push: Tensor | None, left: Tensor | None
    ) -> Tensor:
        if seen is None:
            return x @ base[:, None].mT + x @ before.mT
        mutual = x @ keys.mT
        result = x @ base[:, None].mT + seen.faded * (x @ before.mT) + (seen.ratio * mutual) @ writes
        if seen.spread is not None and push is not None and left is not None:
            result = result + (seen.spread.matrix * mutual) @ push + seen.spread.first * (x @ left.mT)
        return result

    query = trace.query
    hidden = layer(
        query, base_inner, trace.inner, trace.inner_key, trace.inner_write, trace.inner_push, trace.inner_momentum
    )
    if rule.depth == 1:
        return hidden
    branch = layer(
        functional.silu(hidden),
        base_outer,
        trace.outer,
        trace.outer_key,
        trace.outer_write,
        trace.outer_push,
        trace.outer_momentum,
    )
    if gain is not None:
        branch = gain[:, None, None] * normalised_rows(branch)[0]
    return query + branch


def read_pieces(
    base: MemoryWeights,
    readout: GateReadout,
    trace: Trace,
    spans: tuple[tuple[int, int], ...],
    rule: WriteRule,
) -> Float[Tensor, "B H T K"]:
    """Read all pieces, neighbours of equal length in one go. base: what decay goes towards; spans: their tokens."""
    base_inner, base_outer = base.inner[:, -1], base.outer[:, -1]
    gain = None if readout.gain is None else readout.gain[:, -1]
    reads = []
    first = 0
    while first < len(spans):
        length = spans[first][1] - spans[first][0]
        stop = first + 1
        while stop < len(spans) and spans[stop][1] - spans[stop][0] == length:
            stop += 1
        part = trace.section(slice(spans[first][0], spans[stop - 1][1]), slice(first, stop))
        reads.append(read_chunks(base_inner, base_outer, gain, part, rule).flatten(2, 3))
        first = stop
    return reads[0] if len(reads) == 1 else torch.cat(reads, dim=2)
