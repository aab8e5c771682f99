"""What a model answers after a text that has been read, always taking the most likely token."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import as_tokens
from nested_lm.reading.generation import generate


def answer_greedily(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    state: StreamState,
    questions: Int[np.ndarray, "R Q"],
    *,
    max_new_tokens: int,
    settled: Sequence[Callable[[str], bool]],
) -> list[str]:
    """Continue questions up to the end of the document, or until a row's score is settled.

    state: a row for each question; it is not changed. settled: says of a row's output that its score is settled.
    """

    found = generate(
        model,
        as_tokens(model, questions),
        max_new_tokens=max_new_tokens,
        stop=tokenizer.end_of_text,
        settled=lambda row, ids: settled[row](tokenizer.decode_after(questions[row], ids)),
        state=state,
    )
    rows = zip(questions, found.tokens.tolist(), found.lengths, strict=True)
    return [tokenizer.decode_after(question, ids[:length]) for question, ids, length in rows]


def string_match(output: str, references: Sequence[str]) -> float:
    """Share of the references that occur in an output, whatever their case.

    Source: RULER (arXiv 2404.06654), `string_match_all`, for one sample and as a share of 1.
    """
    lower = output.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)
