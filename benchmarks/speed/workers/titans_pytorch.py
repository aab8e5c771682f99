"""Jobs of the PyPI package titans-pytorch."""

import torch
from titans_pytorch import MemoryMLP, NeuralMemory
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.workers.job import Job, forward_backward, language_model_job, random_tokens, size_of


def _memory(width: int, head_width: int, chunk: int, expansion: float) -> NeuralMemory:
    memory = NeuralMemory(
        dim=width,
        chunk_size=chunk,
        dim_head=head_width,
        heads=width // head_width,
        model=MemoryMLP(head_width, depth=2, expansion_factor=expansion),
    )
    # Heads share storage as they come, which optimizers refuse.
    memory.memory_model_parameters = nn.ParameterList(
        nn.Parameter(parameter.detach().clone()) for parameter in memory.memory_model_parameters
    )
    return memory


def memory(width: int, head_width: int, chunk: int, expansion: float, batch: int, tokens: int) -> Job:
    """The layer, forward and backward."""
    layer = _memory(width, head_width, chunk, expansion)
    x = torch.randn(batch, tokens, width)
    return Job(batch * tokens, size_of(layer), forward_backward(lambda: layer(x)[0], layer.parameters()))


class Block(nn.Module):
    """A memory and a gated MLP, pre-norm, residual: the LMM of the Titans paper around the package's layer."""

    def __init__(self, width: int, head_width: int, chunk: int, hidden: int) -> None:
        super().__init__()
        self.memory = _memory(width, head_width, chunk, 2.0)  # has a norm of its own
        self.norm = nn.RMSNorm(width)
        self.inner = nn.Linear(width, 2 * hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        x = x + self.memory(x)[0]
        gate, value = self.inner(self.norm(x)).chunk(2, dim=-1)
        return x + self.outer(functional.silu(gate) * value)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, tied head."""

    def __init__(self, vocab: int, width: int, layers: int, head_width: int, chunk: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, head_width, chunk, hidden) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        return functional.linear(self.norm(self.blocks(self.embedding(tokens))), self.embedding.weight)


def language_model(
    vocab: int, width: int, layers: int, head_width: int, chunk: int, batch: int, tokens: int, *, parameters: int
) -> Job:
    """A training step of a language model with the package's memory as mixer, widened to a size."""
    one, two = (size_of(LanguageModel(vocab, width, layers, head_width, chunk, hidden)) for hidden in (1, 2))
    hidden = max(1, round(1 + (parameters - one) / (two - one)))
    built = LanguageModel(vocab, width, layers, head_width, chunk, hidden)
    return language_model_job(built, built, random_tokens(batch, tokens, vocab))


JOBS = {"memory": memory, "language_model": language_model}
