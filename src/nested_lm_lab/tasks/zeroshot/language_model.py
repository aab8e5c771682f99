"""A model of the LM Evaluation Harness over anything that scores sequences of tokens.

This module imports the harness, which takes seconds; import it where it is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.reader import Document, Scored
from nested_lm_lab.tasks.zeroshot.continuations import Continuation, continue_prompts
from nested_lm_lab.tasks.zeroshot.sequences import Likelihood, ModelScorer, Scorer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class Requests:
    """Requests of the harness as documents. documents: in the order of the requests; cut: how many were too long."""

    def __init__(self, documents: list[Document], places: list[tuple[int, int]], cut: int) -> None:
        self.documents, self.cut = documents, cut
        self._places = places  # of each request: the document and the sequence in it

    def answers(self, scores: Sequence[Sequence[Likelihood]]) -> list[tuple[float, bool]]:
        """What the harness wants to know of each request: log-likelihood, and whether greedy decoding would agree."""
        found = (scores[document][index] for document, index in self._places)
        return [(-score.nats, score.greedy) for score in found]


class RollingRequests:
    """Whole texts in windows that do not overlap. documents: one a window."""

    cut = 0

    def __init__(self, documents: list[Document], owners: list[int], count: int) -> None:
        self.documents = documents
        self._owners, self._count = owners, count

    def answers(self, scores: Sequence[Sequence[Likelihood]]) -> list[float]:
        """Log-likelihood of each text."""
        sums = np.zeros(self._count)
        for owner, (score,) in zip(self._owners, scores, strict=True):
            sums[owner] -= score.nats
        return sums.tolist()


@register_model("nested-lm")
class HarnessModel(TemplateLM):
    """What the harness asks of a model. Every document starts from a fresh state, with the start token.

    The choices of a document are scored after the same text: where it is longer than the model reads, all lose the
    same tokens at its beginning, after the start token.

    tokenizer: of the model. scorer: scores sequences. max_length: tokens read of a document at the most, its scored
        tokens excepted; the length of a window of `loglikelihood_rolling`.
    model: generates text; None for a scorer that cannot.
    """

    def __init__(
        self, tokenizer: TextTokenizer, scorer: Scorer, *, max_length: int, model: LanguageModel | None = None
    ) -> None:
        super().__init__()
        self.text_tokenizer, self.scorer, self.model = tokenizer, scorer, model
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self.text_tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token that starts documents."""
        return self.text_tokenizer.start_of_text

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer."""
        return self.text_tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:  # noqa: ARG002
        """Tokens of a text, after the start token unless it is asked to be left out."""
        start = [] if add_special_tokens is False else [self.prefix_token_id]
        return [*start, *self.text_tokenizer.encode(string)]

    def requests(self, instances: Sequence["Instance"]) -> Requests:
        """Turn pairs of context and continuation into documents.

        Tokens are those of `TemplateLM._encode_pair`: context and continuation are encoded together, and what comes
        after as many tokens as the context has by itself is scored.
        """
        pairs = [_move_spaces(*instance.args) for instance in instances]
        wholes = self.text_tokenizer.encode_many([context + continuation for context, continuation in pairs])
        contexts = sorted({context for context, _ in pairs})
        lengths = dict(zip(contexts, map(len, self.text_tokenizer.encode_many(contexts)), strict=True))
        places: list[tuple[int, int]] = []
        found: dict[tuple[object, object], int] = {}
        documents: list[list[Scored]] = []
        for instance, (context, _), tokens in zip(instances, pairs, wholes, strict=True):
            key = (instance.task_name, instance.doc_id)
            number = found.setdefault(key, len(documents))
            if number == len(documents):
                documents.append([])
            places.append((number, len(documents[number])))
            documents[number].append(Scored(self._started(tokens), 1 + lengths[context]))
        shortened = [self._shorten(document) for document in documents]
        cut = sum(len(a[0].tokens) != len(b[0].tokens) for a, b in zip(documents, shortened, strict=True))
        return Requests(shortened, places, cut)

    def rolling_requests(self, instances: Sequence["Instance"]) -> RollingRequests:
        """Cut texts into windows of `max_length`, each after the last token of the one before."""
        documents: list[Document] = []
        owners: list[int] = []
        texts = self.text_tokenizer.encode_many([instance.args[0] for instance in instances])
        for owner, tokens in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=tokens.tolist(),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, scored in map(make_disjoint_window, windows):
                documents.append((Scored(np.array(context + scored), len(context)),))
                owners.append(owner)
        return RollingRequests(documents, owners, len(texts))

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Log-likelihood of continuations after their contexts."""
        asked = self.requests(requests)
        return asked.answers(self.scorer.score(asked.documents))

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Log-likelihood of whole texts."""
        asked = self.rolling_requests(requests)
        return asked.answers(self.scorer.score(asked.documents))

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Continue prompts up to a stop, as the keyword arguments of each request say."""
        if self.model is None or not isinstance(self.scorer, ModelScorer):
            raise NotImplementedError("this scorer cannot generate text")
        asked = [Continuation.of(self._prompt(instance.args[0]), instance.args[1]) for instance in requests]
        return continue_prompts(self.model, self.text_tokenizer, asked, batch_rows=self.scorer.batch_rows)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: object,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of token sequences, each a document of its own."""
        documents = [
            self._shorten([Scored(np.array(context + scored), len(context))]) for _, context, scored in requests
        ]
        return [(-score.nats, score.greedy) for (score,) in self.scorer.score(documents)]

    def _started(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.prefix_token_id], tokens])

    def _shorten(self, document: Sequence[Scored]) -> Document:
        """Drop tokens after the start token until every sequence fits; scored tokens are never dropped."""
        excess = max(len(sequence.tokens) - 1 for sequence in document) - self.max_length
        room = min(sequence.first for sequence in document) - 1
        drop = min(max(excess, 0), room)
        if not drop:
            return tuple(document)
        return tuple(
            Scored(np.concatenate([sequence.tokens[:1], sequence.tokens[1 + drop :]]), sequence.first - drop)
            for sequence in document
        )

    def _prompt(self, context: str) -> np.ndarray:
        tokens = self._started(self.text_tokenizer.encode_many([context])[0])
        return np.concatenate([tokens[:1], tokens[1:][-(self.max_length - 1) :]])


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Count spaces at the end of the context to the continuation, as tokens do."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
