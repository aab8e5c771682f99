"""Contexts that come back: a task in which something has to be kept while other things are learned and dropped.

Half of the tokens follow a Markov chain that holds for 512 tokens, and that may come back later; the other half follow
a table that is drawn anew every 128 tokens. Both are new in every row, and the mixer sees two tokens only, so whatever
is known of them was written into the levels of the channel while they were read.

Shapes: B batch, T tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.learning.protocol import RECIPE, Measures
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState, map_tensors

SYMBOLS = 8
"""Successors of each kind: tokens 0-7 follow the chain, 8-15 the short-lived table."""

CONTEXT_TOKENS, TABLE_TOKENS, CHAINS = 512, 128, 4

LEVELS: dict[str, dict[str, Any]] = {
    "levels_3": {"periods": (32, 128, 512), "rates": (0.05, 0.02, 0.01), "expansion": 1.0},
    "levels_1": {"periods": (32,), "rates": (0.05,), "expansion": 3.0},
    "unwritten": {"periods": (32,), "rates": (0.0,), "expansion": 3.0},
}
"""Arm -> clocks of its levels in context; equally many parameters."""


def contexts(plan: Tensor, generator: torch.Generator) -> Tensor:
    """Draw tokens (B, T), T = 512 a context. plan: which of the row's four chains holds in each context (B, N)."""
    batch, length = plan.shape[0], plan.shape[1] * CONTEXT_TOKENS
    chains = torch.randint(0, SYMBOLS, (batch, CHAINS, 2 * SYMBOLS), generator=generator)
    tables = torch.randint(0, SYMBOLS, (batch, length // TABLE_TOKENS, 2 * SYMBOLS), generator=generator) + SYMBOLS
    follows_chain = torch.rand(batch, length, generator=generator) < 0.5
    tokens = torch.zeros(batch, length, dtype=torch.long)
    rows, last = torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    for t in range(length):
        by_chain = chains[rows, plan[:, t // CONTEXT_TOKENS], last]
        last = torch.where(follows_chain[:, t], by_chain, tables[rows, t // TABLE_TOKENS, last])
        tokens[:, t] = last
    return tokens


@dataclass(frozen=True)
class Clock:
    """Next-token loss where contexts come back; `benchmarks/learning/protocol.py` says what the methods do.

    num_contexts: in a training row. batch: rows of a step.
    """

    name: str
    about: str
    steps: int
    rate: float = 3e-3
    num_contexts: int = 3
    batch: int = 16

    arms: ClassVar[tuple[str, ...]] = tuple(LEVELS)
    unit: ClassVar[Literal["nats"]] = "nats"

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
                "channel": {"kind": "cms", "levels": levels, "in_context": shared},
                "tie_embeddings": False,
                "init_std": 0.3,
            }
        )

    def build(self, arm: str, seed: int) -> LanguageModel:
        """Build the model."""
        model = LanguageModel(self.configuration(arm))
        model.initialise(seed)
        return model

    def loss(self, model: LanguageModel, generator: torch.Generator, progress: float) -> Tensor:
        """Next-token loss of rows in which no context follows itself."""
        del progress
        steps = torch.randint(1, CHAINS, (self.batch, self.num_contexts), generator=generator)
        tokens = contexts(steps.cumsum(1) % CHAINS, generator)
        return losses(model(tokens[:, :-1]).logits, tokens[:, 1:]).mean()

    def measure(self, model: LanguageModel, rows: int) -> Measures:
        """Loss where the first context comes back and where a new one comes instead, and what a lesion costs there.

        The lesion sets the slowest level back to its learned weights when the third context begins.
        """
        found: Measures = {}
        for name, plan in (("back", [0, 1, 0]), ("new", [0, 1, 2])):
            tokens = contexts(torch.tensor(plan).repeat(max(4, rows // 8), 1), torch.Generator().manual_seed(7))
            begin = 2 * CONTEXT_TOKENS + 1  # the slowest level writes when the first token of the context is there
            first = model(tokens[:, :begin])
            rest, targets = tokens[:, begin:-1], tokens[:, begin + 1 :]
            whole = losses(model(rest, state=first.state).logits, targets)
            early = slice(0, TABLE_TOKENS)
            if name == "back":
                found["first context"] = (
                    losses(first.logits, tokens[:, 1 : begin + 1])[:, :CONTEXT_TOKENS].mean().item()
                )
            found[f"context {name}"] = whole.mean().item()
            found[f"context {name}, first {TABLE_TOKENS}"] = whole[:, early].mean().item()
            if model.writer is not None:
                hurt = losses(model(rest, state=lesioned(first.state)).logits, targets)
                found[f"lesion, context {name}"] = (hurt - whole).mean().item()
        return found

    def references(self, rows: int) -> dict[str, Measures]:
        """Knowing nothing but the symbols, and knowing chain and table."""
        del rows
        names = ("first context", "context back", "context new")
        uniform = torch.tensor(2.0 * SYMBOLS).log().item()
        return {
            "guessing": dict.fromkeys(names, uniform),
            "knowing both": dict.fromkeys(names, torch.tensor(2.0).log().item()),
        }

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Lengths and steps."""
        sizes = [CONTEXT_TOKENS, TABLE_TOKENS, CHAINS, SYMBOLS, self.num_contexts]
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
    "Next-token loss in nats. Half of the tokens follow a chain that holds for 512 tokens, half a table that holds for "
    "128; the mixer sees two tokens, the rest must be written into the levels. Contexts run A B A (`back`) or A B C "
    "(`new`).",
    150,
)
