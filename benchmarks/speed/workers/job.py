"""What a worker can be asked to run, and the training step all sides share."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

CLIP_NORM = 1.0


class Job(NamedTuple):
    """Something to time. tokens: how many a call processes; parameters: trainable ones behind it."""

    tokens: int
    parameters: int
    call: Callable[[], object]


def size_of(module: nn.Module) -> int:
    """Trainable parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def random_tokens(batch: int, tokens: int, vocab: int) -> Tensor:
    """Token ids, one more than is predicted, the same on every side."""
    return torch.randint(vocab, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))


def forward_backward(predict: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Callable[[], None]:
    """One forward pass and its gradients, which replace those of the last call."""
    parameters = list(parameters)

    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        predict().square().mean().backward()

    return call


def forward_only(predict: Callable[[], object]) -> Callable[[], None]:
    """One forward pass without gradients."""

    @torch.no_grad()
    def call() -> None:
        predict()

    return call


def language_model_job(module: nn.Module, predict: Callable[[Tensor], Tensor], data: Tensor) -> Job:
    """A whole training step: forward, loss, backward, clipping, AdamW. data: token ids, shape (batch, tokens + 1)."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        logits = predict(data[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss.item()}: what is timed does not work")

    return Job(data[:, 1:].numel(), size_of(module), call)
