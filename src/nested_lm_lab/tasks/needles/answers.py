"""Scoring answers after a text that has been read: teacher-forced, and by greedy decoding.

Shapes: R rows, Q tokens of the question, A tokens of the longest answer, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import NumericsError
from nested_lm.nn.state import StreamState
from nested_lm.reading.generation import reading_mode
from nested_lm_lab.tasks.needles.reading import Reader, memory_watch


class Forced(NamedTuple):
    """Answers under teacher forcing. nats: a token. exact: greedy decoding would begin with the answer. rank: of the
    answer's first token; 1 is the model's first choice.
    """

    nats: Float[np.ndarray, "R"]
    exact: np.ndarray  # (R,) bool
    rank: Int[np.ndarray, "R"]


class Questioned(NamedTuple):
    """A question that has been read. logits: after its last token. state: after it."""

    logits: Float[torch.Tensor, "R V"]
    state: StreamState


def read_question(reader: Reader, state: StreamState, questions: Int[np.ndarray, "R Q"]) -> Questioned:
    """Go on with a question from the end of the text. The state is not changed."""
    with reading_mode(reader.model), memory_watch():
        output = reader.model(reader.tensor(questions), state=state, predictions="last")
    return Questioned(output.logits[:, -1].float(), output.state)


def force(reader: Reader, questioned: Questioned, answers: Sequence[np.ndarray]) -> Forced:
    """Score given answers.

    Raises:
        NumericsError: a score is not finite.
    """
    sizes = np.array([len(answer) for answer in answers])
    given = np.zeros((len(answers), int(sizes.max())), dtype=np.int64)
    for row, answer in enumerate(answers):
        given[row, : len(answer)] = answer
    wanted = reader.tensor(given)[..., None]
    logits = questioned.logits[:, None]
    if given.shape[1] > 1:
        with reading_mode(reader.model), memory_watch():
            more = reader.model(reader.tensor(given[:, :-1]), state=questioned.state, final=True).logits.float()
        logits = torch.cat([logits, more], dim=1)
    chosen = logits.gather(2, wanted)
    # Ties count against the model: equal logits for all tokens must not pass for knowing the answer.
    rank = (logits >= chosen).sum(dim=2).cpu().numpy()
    nats = -logits.log_softmax(dim=2).gather(2, wanted)[..., 0].double().cpu().numpy()
    scored = np.arange(given.shape[1]) < sizes[:, None]
    if not np.isfinite(nats[scored]).all():
        raise NumericsError(
            "the score of an answer is not finite: the model has diverged, or overflows on texts this long. Evaluate "
            "an earlier checkpoint or shorter lengths; `nested-lm audit` says whether its memories stay bounded"
        )
    return Forced((nats * scored).sum(1) / sizes, ((rank == 1) | ~scored).all(1), rank[:, 0])


def decode_greedily(
    reader: Reader,
    questioned: Questioned,
    tokenizer: TextTokenizer,
    *,
    max_new_tokens: int,
    settled: Sequence[Callable[[str], bool]],
) -> list[str]:
    """What the model answers, always taking the most likely token.

    A row ends at the end of the document, or as soon as its score is settled, which `settled` says of its output.
    """
    logits, state = questioned
    active = np.arange(len(settled))
    written: list[list[int]] = [[] for _ in settled]
    with reading_mode(reader.model), memory_watch():
        for step in range(max_new_tokens):
            tokens = logits.argmax(dim=1)
            for row, token in zip(active, tokens.tolist(), strict=True):
                written[row].append(token)
            going = [
                at
                for at, row in enumerate(active)
                if written[row][-1] != tokenizer.end_of_text and not settled[row](tokenizer.decode(written[row]))
            ]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(active):
                kept = torch.tensor(going)
                active, state, tokens = active[going], state.select(kept), tokens[kept.to(tokens.device)]
            output = reader.model(tokens[:, None], state=state, predictions="last")
            logits, state = output.logits[:, -1].float(), output.state
    end = tokenizer.end_of_text
    return [tokenizer.decode(ids[:-1] if ids and ids[-1] == end else ids) for ids in written]


def string_match(output: str, references: Sequence[str]) -> float:
    """Share of the references that occur in an output, whatever their case.

    Source: RULER (arXiv 2404.06654), `string_match_all`, for one sample and as a share of 1.
    """
    lower = output.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)
