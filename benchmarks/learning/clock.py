"""Two clocks in one stream: a task in which something has to be kept while something else is learned and dropped.

Half of the tokens follow a Markov chain that holds for the whole row; the other half follow a table that is drawn anew
every 128 tokens. Both are new in every row, and the mixer sees two tokens only, so whatever is known of them was
written into the levels of the channel while they were read. What is written of a table is wrong 128 tokens later; what
is written of the chain stays right.

Shapes: B batch, T tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.learning.protocol import RECIPE, Measures, Progress
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState, map_tensors

SYMBOLS = 8
"""Successors of each kind: tokens 0-7 follow the chain, 8-15 the short-lived table."""

TABLE_TOKENS = 128
ROW_TOKENS, BEFORE_TOKENS = 12 * TABLE_TOKENS, 8 * TABLE_TOKENS
"""Tokens of a row, and those before the lesion; both end where a table does."""

TWO: dict[str, Any] = {"periods": (16, 128), "rates": (0.1, 0.03), "expansion": 1.5}
ONE: dict[str, Any] = {"wiring": "sequential", "periods": (16,), "expansion": 3.0}
LEVELS: dict[str, dict[str, Any]] = {
    "nested_2": TWO | {"wiring": "nested"},
    "chained_2": TWO | {"wiring": "sequential"},
    "level_1_fast": ONE | {"rates": (0.1,)},
    "level_1": ONE | {"rates": (0.05,)},
    "level_1_slow": ONE | {"rates": (0.02,)},
    "unwritten": ONE | {"rates": (0.0,)},
}
"""Arm -> clocks of its levels in context; equally many parameters."""


def streams(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw tokens (B, T): a chain for each row, a table for each row and stretch."""
    chain = torch.randint(0, SYMBOLS, (batch, 2 * SYMBOLS), generator=generator)
    stretches = -(-length // TABLE_TOKENS)
    tables = torch.randint(0, SYMBOLS, (batch, stretches, 2 * SYMBOLS), generator=generator) + SYMBOLS
    follows_chain = torch.rand(batch, length, generator=generator) < 0.5
    tokens = torch.zeros(batch, length, dtype=torch.long)
    rows, last = torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    for t in range(length):
        last = torch.where(follows_chain[:, t], chain[rows, last], tables[rows, t // TABLE_TOKENS, last])
        tokens[:, t] = last
    return tokens


@dataclass(frozen=True)
class Clock:
    """Next-token loss with a slow and a fast part; `benchmarks/learning/protocol.py` says what the methods do.

    batch: rows of a step.
    """

    name: str
    about: str
    steps: int
    rate: float = 3e-3
    batch: int = 16

    arms: ClassVar[tuple[str, ...]] = tuple(LEVELS)
    rates: ClassVar[None] = None
    shown: ClassVar[tuple[str, ...]] = ("first third", "last third", "lesion, new table")
    unit: ClassVar[Literal["nats"]] = "nats"
    differences: ClassVar[tuple[str, ...]] = ()

    def configuration(self, arm: str) -> ModelConfig:
        """One block that sees two tokens, and the arm's levels."""
        given = LEVELS[arm]
        levels = [
            {
                "period_tokens": period,
                "expansion": given["expansion"],
                "in_context": {"period_tokens": period, "rate": rate, "rule": {"kind": "gd"}},
            }
            for period, rate in zip(given["periods"], given["rates"], strict=True)
        ]
        shared = {"lifetime": "document", "meta_gradient": "first_order"}
        return ModelConfig.model_validate(
            {
                "vocab_size": 2 * SYMBOLS,
                "width": 32,
                "num_layers": 1,
                "mixer": {"kind": "attention", "num_heads": 1, "window": 2},
                "channel": {"kind": "cms", "wiring": given["wiring"], "levels": levels, "in_context": shared},
                "tie_embeddings": False,
                "init_std": 0.3,
            }
        )

    def build(self, arm: str, seed: int) -> LanguageModel:
        """Build the model."""
        model = LanguageModel(self.configuration(arm))
        model.initialise(seed)
        return model

    def loss(self, model: LanguageModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Next-token loss of fresh rows."""
        del progress
        tokens = streams(self.batch, ROW_TOKENS, generator)
        return losses(model(tokens[:, :-1]).logits, tokens[:, 1:]).mean()

    def measure(self, model: LanguageModel, rows: int) -> Measures:
        """Loss of the first and the last third of a row, and what a lesion costs in the last.

        The lesion sets the slowest level back to its learned weights where the last third begins, which is where a
        table ends: with one level, everything that was written.
        """
        tokens = streams(max(4, rows // 4), ROW_TOKENS, torch.Generator().manual_seed(7))
        begin = BEFORE_TOKENS + 1  # the slowest level writes when the first token behind its period is there
        first = model(tokens[:, :begin])
        rest, targets = tokens[:, begin:-1], tokens[:, begin + 1 :]
        whole = losses(model(rest, state=first.state).logits, targets)
        third = ROW_TOKENS - BEFORE_TOKENS
        found = {
            "first third": losses(first.logits, tokens[:, 1 : begin + 1])[:, :third].mean().item(),
            "last third": whole.mean().item(),
            "new table": whole[:, :TABLE_TOKENS].mean().item(),
        }
        if model.writer is not None:
            cost = losses(model(rest, state=lesioned(first.state)).logits, targets) - whole
            found["lesion, last third"] = cost.mean().item()
            found["lesion, new table"] = cost[:, :TABLE_TOKENS].mean().item()
        return found

    def references(self, rows: int) -> dict[str, Measures]:
        """Knowing nothing but the symbols, and knowing chain and table."""
        del rows
        names = ("first third", "last third", "new table")
        return {
            "guessing": dict.fromkeys(names, torch.tensor(2.0 * SYMBOLS).log().item()),
            "knowing both": dict.fromkeys(names, torch.tensor(2.0).log().item()),
        }

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Lengths and steps."""
        sizes = [ROW_TOKENS, BEFORE_TOKENS, TABLE_TOKENS, SYMBOLS]
        return [self.name, *sizes, self.rate, steps, self.batch, rows, RECIPE.warmup_steps]


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of every prediction (B, T)."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def lesioned(state: StreamState) -> StreamState:
    """Set the fast copies of the slowest level back to its learned weights."""
    *others, slowest = state.in_context.levels
    empty = slowest._replace(
        distance=map_tensors(slowest.distance, torch.zeros_like),
        pending=map_tensors(slowest.pending, torch.zeros_like),
    )
    return replace(state, in_context=state.in_context._replace(levels=(*others, empty)))


CLOCK = Clock(
    "clock",
    "Next-token loss in nats. Half of the tokens follow a chain that holds for the row of 1,536, half a table that "
    "holds for 128; the mixer sees two tokens, the rest must be written into the levels. The lesion sets the slowest "
    "level back after 1,024 tokens, where a table ends; `new table` is the 128 tokens that follow.",
    120,
)
