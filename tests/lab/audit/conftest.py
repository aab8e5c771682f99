from collections.abc import Callable

import pytest
import torch

from nested_lm.config.load import parse_run
from nested_lm_lab.audit import memories
from nested_lm_lab.audit.finding import Finding
from nested_lm_lab.audit.runner import CHECKS
from nested_lm_lab.audit.subject import Subject

STEP_TOKENS = 32
MEMORIES = {"kind": "self_modifying", "num_heads": 2, "head_width": 4, "chunk": 4}
LEVELS = [{"period_tokens": STEP_TOKENS, "expansion": 1.0}, {"period_tokens": 2 * STEP_TOKENS, "expansion": 1.0}]
WRITING = [
    level | {"in_context": {"period_tokens": 4 * 2**index, "rate": 0.1, "rule": {"kind": "gd"}}}
    for index, level in enumerate(LEVELS)
]
ATTENTION = {"kind": "attention", "num_heads": 2}
MODELS = {
    "hope": {"mixer": MEMORIES, "channel": {"kind": "cms", "levels": LEVELS}},
    "transformer": {"mixer": ATTENTION, "channel": {"kind": "swiglu", "expansion": 2.0}},
    "writing": {
        "mixer": ATTENTION,
        "channel": {
            "kind": "cms",
            "levels": WRITING,
            "in_context": {"lifetime": "document", "meta_gradient": "first_order"},
        },
    },
    "delta": {
        "mixer": {"kind": "gated_delta_net", "num_heads": 2, "head_width": 4},
        "channel": {"kind": "swiglu", "expansion": 2.0},
    },
}


@pytest.fixture
def make_subject() -> Callable[..., Subject]:
    """Subjects with tiny models: `make_subject("hope", init_std=1.0)`."""

    def make(model: str, **changes) -> Subject:
        run = parse_run(
            {
                "name": "tiny",
                "output_dir": "nowhere",
                "seed": 3,
                "data": {
                    "name": "none",
                    "output_dir": "nowhere",
                    "source": {"kind": "embedded"},
                    "tokenizer": {"kind": "byte_bpe", "vocab_size": 300},
                },
                "model": {"vocab_size": 61, "width": 16, "num_layers": 2, **MODELS[model], **changes},
                "train": {
                    "budget_tokens": 10 * STEP_TOKENS,
                    "context_length": 16,
                    "batch_size": 2,
                    "optimizer": {"kind": "adamw", "rate": 1e-2},
                    "schedule": {"kind": "cosine", "warmup_tokens": 0},
                    "evaluate_every_tokens": STEP_TOKENS,
                    "evaluate_tokens": STEP_TOKENS,
                    "checkpoints": {"every_tokens": STEP_TOKENS},
                },
                "eval": {},
            },
            "test",
        )
        return Subject("tiny", run, run.model, torch.device("cpu"))

    return make


@pytest.fixture(autouse=True)
def _short_long_stream(monkeypatch):
    """Hundreds of tokens in place of thousands: the tests show that the check works, not that memories live."""
    monkeypatch.setattr(memories, "LONG_STREAM", 256)
    monkeypatch.setattr(memories, "SEGMENT", 128)


@pytest.fixture(scope="session")
def findings() -> Callable[[str, Subject], dict[str, Finding]]:
    """Run one check; its findings by figure."""

    def run(check: str, subject: Subject) -> dict[str, Finding]:
        return {finding.figure: finding for finding in CHECKS[check].run(subject)}

    return run


@pytest.fixture(scope="session")
def missed(findings) -> Callable[[str, Subject], list[str]]:
    """Run one check; the figures that it missed."""

    def run(check: str, subject: Subject) -> list[str]:
        return [figure for figure, finding in findings(check, subject).items() if finding.state == "missed"]

    return run
