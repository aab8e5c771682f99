"""Two invented languages, learned one after the other by reading translated sentences.

Each language is a table from English words to invented ones, disjoint from the other's, and a word order. Learning the
second must not take the place of the first: both are asked after A, after B, and after each order of the two.

A synthetic twin of the two-language task of arXiv 2512.24695 (after MTOB, arXiv 2309.16575), which cannot be shipped.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, pip_install
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import as_tokens
from nested_lm.reading.generation import generate
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.tasks.continual.choices import choice_tokens, read_stream, score_choices
from nested_lm_lab.tasks.continual.invented import make_words
from nested_lm_lab.tasks.continual.schema import LanguageScores, LanguagesMetrics, TranslationScore
from nested_lm_lab.tasks.continual.settings import ContinualSettings

VERSION = "1"

NOUNS = ("man", "woman", "child", "king", "horse", "dog", "ship", "house", "river", "law", "army", "nation")
VERBS = ("sees", "loves", "leaves", "keeps", "finds", "calls", "serves", "follows")
ADJECTIVES = ("old", "new", "great", "small", "good", "free", "strong", "poor")

ORDERS = {"A": (3, 4, 2, 0, 1), "B": (2, 1, 0, 4, 3)}
"""Places of adjective, noun, verb, adjective, noun in a sentence of each language."""

Pair = tuple[str, str]
"""A sentence of the language and its English translation."""


@dataclass(frozen=True)
class Language:
    """Lessons and held-out tests; no sentence is in both."""

    name: str
    lessons: tuple[Pair, ...]
    tests: tuple[Pair, ...]


def make_languages(settings: ContinualSettings) -> tuple[Language, Language]:
    """Invent two languages for the same English sentences.

    Raises:
        ConfigError: the vocabulary is too small for that many different sentences.
    """
    nouns, verbs, adjectives = _vocabulary(settings.vocabulary)
    wanted = settings.lesson_sentences + settings.test_sentences
    possible = (len(nouns) * len(adjectives)) ** 2 * len(verbs)
    if wanted > possible // 2:
        raise ConfigError(
            f"{settings.vocabulary} words make {possible} sentences, and {wanted} different ones are asked for; use "
            "more words or fewer sentences"
        )
    rng = random.Random(f"{settings.seed}/languages")
    sentences: dict[tuple[str, ...], None] = {}
    while len(sentences) < wanted:
        words = (adjectives, nouns, verbs, adjectives, nouns)
        sentences[tuple(rng.choice(choices) for choices in words)] = None
    taken = {*nouns, *verbs, *adjectives}
    made = []
    for name in ("A", "B"):
        english = [*nouns, *verbs, *adjectives]
        table = dict(zip(english, make_words(len(english), rng, taken=taken), strict=True))
        pairs = [
            (
                " ".join(table[words[place]] for place in ORDERS[name]),
                "the {} {} {} the {} {}".format(*words),
            )
            for words in sentences
        ]
        made.append(
            Language(name, tuple(pairs[: settings.lesson_sentences]), tuple(pairs[settings.lesson_sentences :]))
        )
    return made[0], made[1]


def _vocabulary(size: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Shares of nouns, verbs and adjectives in a vocabulary. Raises ConfigError when it is too large."""
    most = 2 * min(len(VERBS), len(ADJECTIVES)) + len(NOUNS)
    if size > most:
        raise ConfigError(f"a vocabulary of {size} words is asked for, and there are {most}; use fewer")
    few = size // 3 if size // 3 <= len(VERBS) else len(VERBS)
    return NOUNS[: size - 2 * few], VERBS[:few], ADJECTIVES[:few]


def require_chrf() -> ModuleType:
    """Import sacrebleu. Raises ConfigError naming the extra when it is not installed."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError(
            "translations are scored with chrF, for which sacrebleu is not installed; run "
            f"`{pip_install('eval')}`, or leave the task `languages` out"
        ) from error
    return sacrebleu


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ChrF of each sentence, 0 to 100, as sacrebleu gives it by default (character 6-grams, beta 2)."""
    chrf = require_chrf()
    return np.array([chrf.sentence_chrf(h, [r]).score for h, r in zip(hypotheses, references, strict=True)])


class Translator:
    """Reads lessons into a stream; forks of it translate."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, settings: ContinualSettings, progress: Progress
    ) -> None:
        self._model, self._tokenizer, self._settings, self._progress = model, tokenizer, settings, progress

    def planned(self, language: Language) -> int:
        """Tokens of learning a language twice and translating it four times, each answer as long as it may be."""
        lessons = sum(len(document) + 1 for document in self._lessons(language))
        tests = sum(
            choice_tokens([context], [answer]) + len(context) + 2 * len(answer)
            for context, answer in self._tests(language)
        )
        return 2 * lessons + 4 * tests

    def learn(self, state: StreamState | None, language: Language) -> StreamState:
        """Read all lessons of a language."""
        start, limit = self._tokenizer.start_of_text, self._settings.max_state_mib
        documents = self._lessons(language)
        return read_stream(self._model, state, documents, start=start, max_state_mib=limit, progress=self._progress)

    def _lessons(self, language: Language) -> list[np.ndarray]:
        return [
            self._tokenizer.encode(f"Language {language.name}: {foreign}\nEnglish: {english}")
            for foreign, english in language.lessons
        ]

    def _tests(self, language: Language) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What is read before each translation, and the translation."""
        for foreign, english in language.tests:
            prompt = self._tokenizer.encode(f"Language {language.name}: {foreign}\nEnglish:")
            context = np.concatenate([[self._tokenizer.start_of_text], prompt])
            yield context, np.concatenate([self._tokenizer.encode(f" {english}"), [self._tokenizer.end_of_text]])

    def translate(self, state: StreamState | None, language: Language) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ChrF, exactness and nats a token of each test sentence. The state is not changed."""
        written, nats = [], []
        for context, answer in self._tests(language):
            scores = score_choices(self._model, state, [context], [answer], batch_size=1, progress=self._progress)
            nats.append(scores[0, 0])
            written.append(self._write(state, context, limit=2 * len(answer)))
        english = [pair[1] for pair in language.tests]
        exact = np.array([a == b for a, b in zip(written, english, strict=True)], dtype=np.float64)
        return sentence_chrf(written, english), exact, np.array(nats)

    def _write(self, state: StreamState | None, context: np.ndarray, *, limit: int) -> str:
        """Greedy translation up to the end of the document or of its line."""
        found = generate(
            self._model,
            as_tokens(self._model, context[None]),
            max_new_tokens=limit,
            stop=self._tokenizer.end_of_text,
            state=state,
        )
        drawn = found.tokens[0].tolist()
        self._progress.total -= limit - len(drawn)  # it ended before it had to
        self._progress.add(len(context) + len(drawn))
        return self._tokenizer.decode_after(context[1:], drawn).strip().split("\n")[0]


def measure(
    model: LanguageModel, tokenizer: TextTokenizer, settings: ContinualSettings, progress: Progress
) -> LanguagesMetrics:
    """Learn A, B, A then B and B then A, each from a fresh stream, and translate both languages after each."""
    require_chrf()
    a, b = make_languages(settings)
    bootstrap = Bootstrap(settings.bootstrap_samples)
    translator = Translator(model, tokenizer, settings, progress)
    progress.total += translator.planned(a) + translator.planned(b)
    after_a, after_b = translator.learn(None, a), translator.learn(None, b)
    both = {"A": translator.learn(after_a, b), "B": translator.learn(after_b, a)}  # by the first one

    def scores(language: Language, alone: StreamState) -> LanguageScores:
        other = "B" if language.name == "A" else "A"
        moments = (None, alone, both[language.name], both[other])
        found = [translator.translate(state, language) for state in moments]
        summed = [
            TranslationScore(chrf=bootstrap.mean(chrf), exact=bootstrap.mean(exact), nats=bootstrap.mean(nats))
            for chrf, exact, nats in found
        ]
        kept = bootstrap.paired(found[2][0], found[1][0], np.ones(len(language.tests)))
        return LanguageScores(
            unread=summed[0], alone=summed[1], first_then_other=summed[2], other_then_this=summed[3], kept=kept
        )

    copied = sentence_chrf([foreign for foreign, _ in a.tests], [english for _, english in a.tests])
    return LanguagesMetrics(
        kind="invented_languages",
        a=scores(a, after_a),
        b=scores(b, after_b),
        copy_chrf=bootstrap.mean(copied),
        lesson_sentences=settings.lesson_sentences,
        tokens_read=both["A"].position,
        state_bytes=both["A"].num_bytes(),
    )
