"""Facts hidden in books: bAbI's questions over texts of any length, after BABILong.

Source: BABILong (arXiv 2406.10149, github.com/booydar/babilong): facts among a book's sentences in their order, the
labels of each task and the scorer `compare_answers`. Deviations: instructions and examples in our own words, the answer
is one word for every task, and lengths are exact.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.task import Task, from_report
from nested_lm_lab.tasks.needles.haystack import Books
from nested_lm_lab.tasks.needles.metrics import BabilongMetrics
from nested_lm_lab.tasks.needles.prompts import Sample, make_rng, scatter
from nested_lm_lab.tasks.needles.settings import BabilongSettings
from nested_lm_lab.tasks.needles.stops import may_go_further
from nested_lm_lab.tasks.needles.stories import PLACES, Story, make_story, read_stories
from nested_lm_lab.tasks.needles.suite import Suite
from nested_lm_lab.tasks.needles.summary import curve_lines
from nested_lm_lab.tasks.needles.tasks import Asked

if TYPE_CHECKING:
    from nested_lm_lab.evaluation.progress import Progress
    from nested_lm_lab.evaluation.subject import Subject

_THINGS = ("bill", "fred", "jeff", "mary", "apple", "football", "milk")
LABELS = {"qa1": PLACES, "qa2": PLACES, "qa3": PLACES, "qa4": PLACES, "qa5": _THINGS}
"""All answers that a task has. Chance is one in their number."""

_ANSWER = " Answer the question after the text with one word, from the facts alone.\n"
_WHERE = (
    "Facts about where people are and what they carry are hidden in the following text. What somebody carries is where "
    "that person is; what was dropped stays there." + _ANSWER
)
_INSTRUCTIONS = {
    "qa1": "Facts about where people are are hidden in the following text. The latest fact about a person counts."
    + _ANSWER,
    "qa2": _WHERE,
    "qa3": _WHERE,
    "qa4": "Facts about which room lies where are hidden in the following text." + _ANSWER,
    "qa5": "Facts about who gave what to whom are hidden in the following text." + _ANSWER,
}
_EXAMPLES = {
    "qa1": (
        ("Paul moved to the cellar. Lucy went to the attic. Paul went to the porch.", "Where is Paul?", "porch"),
        ("Lucy went back to the barn. Paul travelled to the attic.", "Where is Lucy?", "barn"),
    ),
    "qa2": (
        ("Paul went to the cellar. Paul took the lamp there. Paul moved to the attic.", "Where is the lamp?", "attic"),
        ("Lucy moved to the barn. Lucy got the rope. Lucy dropped the rope.", "Where is the rope?", "barn"),
    ),
    "qa3": (
        (
            "Paul took the lamp. Paul moved to the cellar. Paul went to the attic.",
            "Where was the lamp before the attic?",
            "cellar",
        ),
        (
            "Lucy went to the barn. Lucy got the rope. Lucy went to the porch.",
            "Where was the rope before the porch?",
            "barn",
        ),
    ),
    "qa4": (
        ("The cellar is south of the porch. The attic is north of the porch.", "What is the porch south of?", "attic"),
        ("The barn is west of the attic. The attic is west of the porch.", "What is west of the attic?", "barn"),
    ),
    "qa5": (
        ("Lucy took the rope there. Lucy gave the rope to Paul.", "Who did Lucy give the rope to?", "Paul"),
        ("Paul got the lamp. Paul handed the lamp to Lucy.", "What did Paul give to Lucy?", "lamp"),
    ),
}
"""Text, question and answer; their people, places and things are in no story."""


class BabilongTask(Task[BabilongSettings, BabilongMetrics]):
    """Questions about facts hidden in books, after BABILong, with controls."""

    name = "babilong"
    version = "1"
    Settings = BabilongSettings
    Metrics = BabilongMetrics

    def __init__(self, settings: BabilongSettings) -> None:
        super().__init__(settings)
        self._suites: tuple[Suite, ...] = ()
        self._books = ""

    @contextmanager
    def opened(self, subject: "Subject") -> Iterator[None]:
        """Read the books and the facts.

        Raises:
            DataError: files that cannot be read, or fewer questions than samples.
        """
        books = Books.open(subject.loaded.tokenizer, self.settings.books)
        self._books = books.identity
        self._suites = babilong_suites(subject.loaded.tokenizer, books, self.settings)
        yield

    def record(self, subject: "Subject") -> dict[str, Any]:  # noqa: ARG002
        """The settings, and the identity of the books."""
        kept = {"tasks", "lengths", "samples", "seed", "max_new_tokens", "bootstrap_samples", "examples"}
        return self.settings.model_dump(mode="json", include=kept) | {
            "facts": "made" if self.settings.facts is None else "bAbI files",
            "books": self._books,
        }

    def measure(self, subject: "Subject", progress: "Progress") -> BabilongMetrics:
        """Measure all tasks and lengths.

        Raises:
            DataError: a length without room, or a haystack that is too short: before anything is read.
        """
        from nested_lm_lab.tasks.needles.curves import measure_curves

        return measure_curves(BabilongMetrics, self.name, subject, self._suites, self.settings, progress)

    def may_go_further(self, old: BabilongMetrics) -> bool:
        """A higher limit for states reads longer texts."""
        return may_go_further(old, self.settings.max_state_mib)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """The share answered at each length, and the effective lengths."""
        assert isinstance(result.metrics, BabilongMetrics)
        yield from curve_lines(result.metrics.tasks)

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """Every score beside its controls."""
        found: list[Any] = from_report("needle_tables", "babilong")(campaign, runs, name)
        return found


def babilong_suites(tokenizer: TextTokenizer, books: Books, settings: BabilongSettings) -> tuple[Suite, ...]:
    """The tasks that settings name.

    Raises:
        DataError: facts that cannot be read, or fewer questions than samples.
    """
    return tuple(_suite(name, tokenizer, books, settings) for name in settings.tasks)


def label_match(output: str, target: str, question: str, labels: tuple[str, ...]) -> bool:
    """Whether the first sentence of an output names the target and no other label, those of the question apart.

    Source: BABILong's `compare_answers` with its `preprocess_output`.
    """
    text = first_sentence(output)
    named = {label for label in labels if label in text} - {label for label in labels if label in question.lower()}
    return named == {target.lower()}


def first_sentence(output: str) -> str:
    """What BABILong's scorer looks at: lower case, up to a full stop or the start of another example."""
    text = output.lower()
    for end in (".", "<context>", "<example>"):
        text = text.split(end)[0]
    return text


def _suite(name: str, tokenizer: TextTokenizer, books: Books, settings: BabilongSettings) -> Suite:
    facts = settings.facts
    stories = None if facts is None else read_stories(facts, name)
    if stories is not None and len(stories) < settings.samples:
        raise DataError(f"{facts} has {len(stories)} questions of {name}, --samples asks for {settings.samples}")
    return Suite(
        name=name,
        upstream=name,
        haystack=books.identity,
        rows=2,
        max_new_tokens=settings.max_new_tokens,
        make=_maker(name, tokenizer, books, settings, stories),
        match=lambda output, sample: float(label_match(output, sample.references[0], sample.words, LABELS[name])),
        settled=lambda output, sample: first_sentence(output) != output.lower(),  # noqa: ARG005  a sentence has ended
    )


def _maker(
    name: str,
    tokenizer: TextTokenizer,
    books: Books,
    settings: BabilongSettings,
    stories: list[Story] | None,
) -> Callable[[int, int], Sample]:
    header = _INSTRUCTIONS[name]
    if settings.examples:
        header += "".join(
            f"Example: {text}\nQuestion: {question}\nAnswer: {answer}.\n" for text, question, answer in _EXAMPLES[name]
        )

    def make(length: int, number: int) -> Sample:
        rng = make_rng(settings.seed, name, length, number, 0)
        if stories is None:
            story = make_story(name, rng)
        else:  # the same order of questions at every length, none of them twice
            order = make_rng(settings.seed, name, 0, 0, 0).permutation(len(stories))
            story = stories[order[number]]
        asked = Asked(
            header=f"{header}Text:\n",
            question=f"\nQuestion: {story.question}\nAnswer:",
            answer=f" {story.answer}",
            references=(story.answer,),
            needles=tuple(f" {fact}" for fact in story.facts),
        )
        sample = scatter(name, tokenizer, books, asked, length=length, rng=rng)
        supports = tuple(
            replace(prompt, needles=tuple(prompt.needles[index] for index in story.supports))
            for prompt in sample.prompts
        )
        return replace(sample, prompts=supports, words=story.question)

    return make
