"""Jobs of the PyPI package nested-learning, as its own training loop runs them (`nested_learning/training.py`)."""

import torch
from nested_learning.levels import LevelSpec
from nested_learning.model import HOPEModel, ModelConfig
from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig
from nested_learning.training import compute_teach_signal
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.workers.job import CLIP_NORM, Job, forward_only, random_tokens, size_of

_MOMENTUM = {"type": "deep_momentum", "params": {"beta": 0.9, "beta2": 0.999, "variant": "nl_l2_precond"}}

OPTIMIZERS = {"titan_opt": _MOMENTUM | {"lr": 6e-4}, "cms_opt": _MOMENTUM | {"lr": 3e-4}}
"""Those of the package's preset hope/pilot_selfmod."""


def write_pass(width: int, chunk: int, batch: int, tokens: int) -> Job:
    """The self-modifying layer: reads, and writes without gradients."""
    layer = SelfModifyingTitans(SelfModifyingTitansConfig(width, chunk_size_other=chunk, chunk_size_memory=chunk))
    x = torch.randn(batch, tokens, width)
    call = forward_only(lambda: layer.forward_with_updates(x, layer.init_fast_state()))
    return Job(batch * tokens, size_of(layer), call)


def _model(vocab: int, width: int, layers: int, heads: int) -> HOPEModel:
    """Preset hope/pilot_selfmod at another size, with the surprise gate open: every write takes place."""
    periods = {"cms_fast": 1, "cms_mid": 4, "cms_slow": 32, "cms_ultra": 128}
    return HOPEModel(
        ModelConfig(
            vocab_size=vocab,
            dim=width,
            num_layers=layers,
            heads=heads,
            titan_level=LevelSpec("titan", 8, optimizer_key="titan_opt"),
            cms_levels=[LevelSpec(name, period, optimizer_key="cms_opt") for name, period in periods.items()],
            optimizers=OPTIMIZERS,
            teach_scale=0.1,
            teach_clip=5.0,
            block_variant="hope_selfmod",
            self_mod_chunk_size=8,
            self_mod_chunk_size_memory=64,
        )
    )


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def fast_step(vocab: int, width: int, layers: int, heads: int, batch: int, tokens: int) -> Job:
    """Training step of the fast mode: one pass for the loss, one for the writes, whose gradients are not taken."""
    model = _model(vocab, width, layers, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = random_tokens(batch, tokens - 1, vocab)  # the package shifts by itself

    def call() -> None:
        state = model.init_fast_state()
        logits = model(data, fast_state=state)
        loss = _loss(logits, data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        with torch.no_grad():
            model(data, teach_signal=compute_teach_signal(model, logits, data), fast_state=state)

    return Job(batch * tokens, size_of(model), call)


def online_step(vocab: int, width: int, layers: int, heads: int, tokens: int) -> Job:
    """Training step of the online mode with chunk 1: loss, backward and writes token by token. Batch 1 is its limit."""
    model = _model(vocab, width, layers, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = random_tokens(1, tokens, vocab)

    def call() -> None:
        state = model.init_fast_state()
        optimizer.zero_grad()
        for token in range(tokens):
            pair = data[:, token : token + 2]  # the package's chunks overlap by one token
            logits = model(pair, fast_state=state)
            _loss(logits, pair).backward()
            signal = compute_teach_signal(model, logits, pair)
            with torch.no_grad():
                model(pair, teach_signal=signal, fast_state=state, finalize_updates=token == tokens - 1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

    return Job(tokens, size_of(model), call)


JOBS = {"write_pass": write_pass, "fast_step": fast_step, "online_step": online_step}
