"""A trained model as one object: text in, text and scores out, and a memory that reading writes into."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nested_lm.checkpoint import LoadedCheckpoint, find_checkpoint, load_model
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import as_tokens, read
from nested_lm.reading.generation import generate
from nested_lm.reading.identity import ModelIdentity, identify
from nested_lm.reading.memory_file import MemoryHeader, load_memory, save_memory
from nested_lm.reading.reader import Reader
from nested_lm.reading.stream import Boundary, StreamReader

BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Score:
    """How well a text was predicted. nats: of each of its tokens and of the end token. bytes: of the text in UTF-8."""

    nats: np.ndarray
    bytes: int

    @property
    def tokens(self) -> int:
        """Tokens that were predicted, the end token included."""
        return len(self.nats)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text; nan for a text of no bytes."""
        return float(self.nats.sum()) * BITS / self.bytes if self.bytes else math.nan

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return float(self.nats.mean())

    def __repr__(self) -> str:
        return (
            f"Score({self.bits_per_byte:.4f} bits per byte, {self.nats_per_token:.4f} nats a token, "
            f"{self.tokens:,} tokens, {self.bytes:,} bytes)"
        )


@dataclass(frozen=True)
class Reading:
    """What reading some documents came to. nats: of all tokens together, each predicted from all before it."""

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needed for a byte of the texts; nan for texts of no bytes."""
        return self.nats * BITS / self.bytes if self.bytes else math.nan


class TrainedModel:
    """A model in evaluation mode, its tokenizer, and a memory: what the model has read and not forgotten.

    `read` writes into the memory. `generate` and `score` go on from it and leave it as it is.

    model: tokens and a state to logits and the next state. tokenizer: text to tokens and back.
    label: what messages and memory files call it. memory: state of one stream; None: nothing has been read.
    """

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, *, label: str = "a model") -> None:
        self.model, self.tokenizer, self.label = model.eval(), tokenizer, label
        self.memory: StreamState | None = None

    @classmethod
    def of(cls, loaded: LoadedCheckpoint) -> "TrainedModel":
        """The model of a checkpoint."""
        return cls(loaded.model, loaded.tokenizer, label=f"{loaded.config.name}, step {loaded.step}")

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        device = next(self.model.parameters()).device
        read = "nothing read" if self.memory is None else f"memory of {self.memory.position:,} tokens"
        return f"TrainedModel({self.label}: {count:,} parameters on {device}, {read})"

    @property
    def boundary(self) -> Boundary:
        """Tokens around every document."""
        return Boundary(self.tokenizer.start_of_text, self.tokenizer.end_of_text)

    def identify(self) -> ModelIdentity:
        """Which model this is. Reads every weight once."""
        return identify(self.model, tokenizer_hash=self.tokenizer.hash, label=self.label)

    def generate(
        self,
        text: str = "",
        *,
        max_new_tokens: int = 120,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int = 1,
        remember: bool = False,
    ) -> str:
        """Continue a text, up to the end of the document or `max_new_tokens`; returns what is new.

        Args:
            text: begins a document; empty for the start of one. It comes after what the memory has read.
            temperature: 0 always takes the most likely token.
            top_p: keeps the most likely tokens up to this probability; 1 keeps all.
            top_k: keeps so many likely tokens; 0 keeps all.
            seed: the same seed writes the same text.
            remember: writes the text and what is new into the memory.

        Raises:
            DataError: the text is not UTF-8.
            NumericsError: predictions are not finite.
            ValueError: an option out of range.
        """
        prompt, end = self.tokenizer.encode(text), self.tokenizer.end_of_text
        found = generate(
            self.model,
            as_tokens(self.model, np.array([[self.tokenizer.start_of_text, *prompt]])),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            generator=torch.Generator().manual_seed(seed),
            stop=end,
            state=self.memory,
        )
        new = found.tokens[0].tolist()
        if remember:  # no call has read the last token yet; an end token is not part of the text
            is_ended = not new or new[-1] == end
            self.memory = found.state if is_ended else read(self.model, found.tokens[:, -1:], found.state).state
        return self.tokenizer.decode_after(prompt, new)

    def score(self, text: str) -> Score:
        """How well the model predicts a document, from what the memory has read; the memory stays as it is.

        Raises:
            DataError: the text is not UTF-8.
            NumericsError: a prediction is not finite.
        """
        return self.score_many([text])[0]

    def score_many(self, texts: Sequence[str], *, rows: int = 8) -> list[Score]:
        """Score documents, each as if it were the only one. rows: documents read side by side. Raises as `score`."""
        documents = [(self.boundary.scored(tokens),) for tokens in self.tokenizer.encode_many(texts)]
        found = Reader(self.model, rows=rows).score(documents, starts=self.memory)
        return [Score(scores.nats, len(text.encode())) for (scores,), text in zip(found, texts, strict=True)]

    def read(self, texts: str | Iterable[str], *, max_state_bytes: int | None = None) -> Reading:
        """Read a document, or several one after the other, into the memory.

        Args:
            max_state_bytes: a memory that takes more is refused. Only attention without a window grows with the text.

        Raises:
            DataError: a text is not UTF-8.
            CheckpointError: the memory outgrows its limit.
            NumericsError: a prediction is not finite. After any error the memory is as it was.
        """
        reader = StreamReader(self.model, self.memory, boundary=self.boundary, max_state_bytes=max_state_bytes)
        documents = size = 0
        for text in [texts] if isinstance(texts, str) else texts:
            reader.read(self.tokenizer.encode_many([text])[0])
            documents, size = documents + 1, size + len(text.encode())
        if documents:
            self.memory = reader.finish()
        return Reading(documents, reader.tokens, size, reader.nats)

    def forget(self) -> None:
        """Empty the memory."""
        self.memory = None

    def save_memory(self, path: str | Path) -> MemoryHeader:
        """Write the memory to a file; one that is there is replaced.

        Raises:
            CheckpointError: nothing has been read.
            NumericsError: the memory holds a value that is not finite.
            DataError: the file cannot be written.
        """
        if self.memory is None:
            raise CheckpointError(f"nothing has been read, so {path} was not written; read a text first")
        return save_memory(Path(path), self.memory, self.identify())

    def load_memory(self, path: str | Path) -> None:
        """Take the memory from a file that this very model wrote.

        Raises:
            CheckpointError: no such file, a damaged one, one of another model, or one of several streams.
        """
        memory = load_memory(Path(path), self.model, self.identify())
        if memory.num_streams != 1:
            raise CheckpointError(
                f"{path} holds {memory.num_streams} streams, a memory here is one; take one with `StreamState.select` "
                "and save it by itself (`nested_lm.reading.memory_file`)"
            )
        self.memory = memory


def choose_device(device: str) -> str:
    """The device that is meant: `auto` is a GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch finds no CUDA device; use cpu, or see `nested-lm doctor`")
    return device


def load(path: str | Path, device: str = "auto") -> TrainedModel:
    """Load a trained model: `nl.load("artifacts/runs/demo")`.

    Args:
        path: a run folder, whose newest checkpoint is taken, or a checkpoint.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: the device is not there.
    """
    chosen = choose_device(device)
    return TrainedModel.of(load_model(find_checkpoint(Path(path), report=_warn), device=chosen))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
