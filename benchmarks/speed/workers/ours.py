"""Jobs of this project, and a Transformer from torch's own layers beside them."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.gate import memory_problem
from benchmarks.speed.workers.job import (
    Job,
    forward_backward,
    forward_only,
    language_model_job,
    random_tokens,
    size_of,
)
from nested_lm.config.model import ModelConfig
from nested_lm.nn.layers import StepContext
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.sizing import count_parameters
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.rule import WriteRates, WriteRule

BACKENDS = {"chunked": memory_chunked, "cpu": memory_cpu, "reference": memory_reference}


def mixer_job(mixer: dict[str, Any], width: int, batch: int, tokens: int, *, train: bool) -> Job:
    """A mixer alone: forward and backward, or the forward pass (with its writes) only."""
    model = {"vocab_size": 2, "width": width, "num_layers": 1, "mixer": mixer}
    built = LanguageModel(ModelConfig.model_validate(model | {"channel": {"kind": "swiglu", "expansion": 1.0}}))
    built.initialise(0)
    layer = built.blocks[0].mixer
    x, context = torch.randn(batch, tokens, width), StepContext(0, None, None)

    def predict() -> Tensor:
        return layer(x, context, layer.initial_state(batch))[0]

    call = forward_backward(predict, layer.parameters()) if train else forward_only(predict)
    return Job(batch * tokens, size_of(layer), call)


def memory_job(backend: str, chunk: int, heads: int, head_width: int, tokens: int) -> Job:
    """The memories alone, forward and backward, by one of their forms."""
    rates = WriteRates(memory=1.0, generators=1.0)
    rule = WriteRule(chunk=chunk, targets="generated", erase_since="start", rates=rates, rate_stretch=0.0)
    problem = memory_problem(rule, 1, tokens, heads, head_width, torch.float32)
    leaves = [*problem[0][:3], *problem[1]]

    def predict() -> Tensor:
        return BACKENDS[backend].self_modify(*problem, rule=rule, position=0, resets=None).reads

    return Job(tokens, sum(part.numel() for part in problem[1]), forward_backward(predict, leaves))


def language_model(
    model: dict[str, Any], batch: int, tokens: int, *, parameters: int | None = None, recompute: str = "none"
) -> Job:
    """A training step of one of this project's models; its channel is widened to a size when one is given."""
    config = ModelConfig.model_validate(model if parameters is None else fitted(model, parameters))
    built = LanguageModel(config, recompute=recompute)
    built.initialise(0)
    return language_model_job(built, lambda x: built(x).logits, random_tokens(batch, tokens, config.vocab_size))


def fitted(model: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Set the expansion of the channel (of every level alike) so that the model has about so many parameters."""

    def widened(expansion: float) -> dict[str, Any]:
        channel = dict(model["channel"])
        if channel["kind"] == "cms":
            channel["levels"] = [level | {"expansion": expansion} for level in channel["levels"]]
        else:
            channel["expansion"] = expansion
        return model | {"channel": channel}

    one, two = (count_parameters(ModelConfig.model_validate(widened(e)))["total"] for e in (1.0, 2.0))
    return widened(1 + (parameters - one) / (two - one))


class PlainTransformer(nn.Module):
    """Transformer of `torch.nn`: pre-norm GELU layers, learned positions, tied embeddings."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(tokens), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        x = self.layers(self.embedding(tokens) + self.positions, mask=self.mask, is_causal=True)
        return nn.functional.linear(x, self.embedding.weight)


def plain_transformer(
    vocab: int, width: int, layers: int, heads: int, batch: int, tokens: int, *, parameters: int
) -> Job:
    """A training step of a Transformer made of torch's layers, its MLPs as wide as the size asks for."""
    one, two = (size_of(PlainTransformer(vocab, width, layers, heads, tokens, hidden)) for hidden in (1, 2))
    hidden = max(1, round(1 + (parameters - one) / (two - one)))
    built = PlainTransformer(vocab, width, layers, heads, tokens, hidden)
    return language_model_job(built, built, random_tokens(batch, tokens, vocab))


JOBS = {
    "mixer": mixer_job,
    "memory": memory_job,
    "language_model": language_model,
    "plain_transformer": plain_transformer,
}
