"""Facts hidden in books: bAbI's questions over texts of any length, after BABILong.

Source: BABILong (arXiv 2406.10149, github.com/booydar/babilong): facts among a book's sentences in their order, the
labels of each task and the scorer `compare_answers`. Deviations: instructions and examples in our own words, the answer
is one word for every task, and lengths are exact.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError
from nested_lm_lab.tasks.needles.haystack import Books
from nested_lm_lab.tasks.needles.measure import Batching, Suite
from nested_lm_lab.tasks.needles.prompts import Sample, make_rng, scatter
from nested_lm_lab.tasks.needles.run import Plan
from nested_lm_lab.tasks.needles.settings import NiahSettings, parse_settings, split_words
from nested_lm_lab.tasks.needles.stories import GENERATED, PLACES, Story, make_story, read_stories
from nested_lm_lab.tasks.needles.tasks import Asked

VERSION = "1"

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


def parse_babilong(
    *, tasks: str, lengths: str, facts: Path | None, max_new_tokens: int, **others: Any
) -> tuple[NiahSettings, tuple[str, ...]]:
    """Read what the command line says. Returns the settings that needles have too, and the tasks.

    Raises:
        ConfigError: an unknown task, or one whose facts are not made here and not given.
    """
    names = tuple(dict.fromkeys(split_words(tasks)))
    for name in names or ("",):
        if name not in LABELS:
            raise ConfigError(f"--tasks: unknown task {name!r}; choices: {', '.join(LABELS)}")
        if facts is None and name not in GENERATED:
            raise ConfigError(
                f"--tasks {name}: its facts are not made here, only those of {', '.join(GENERATED)}; name the folder "
                "of bAbI's English files with --facts"
            )
    settings = parse_settings(
        tasks="s1", lengths=lengths, depths="0.5", haystack=None, max_new_tokens=max_new_tokens, **others
    )
    return settings, names


def plan_babilong(
    loaded: LoadedCheckpoint, settings: NiahSettings, names: tuple[str, ...], *, facts: Path | None, examples: bool
) -> Plan:
    """The plan of questions about facts in books.

    facts: folder of bAbI's files; None: facts are made. examples: two worked examples stand before the text.

    Raises:
        DataError: files that cannot be read, or fewer questions than samples.
    """
    books = Books.open(loaded.tokenizer, settings.files)
    suites = tuple(_suite(name, loaded.tokenizer, books, settings, facts, examples) for name in names)
    return Plan(
        kind="babilong",
        task="babilong",
        version=VERSION,
        suites=suites,
        lengths=settings.lengths,
        batching=Batching(settings.samples, settings.batch_rows),
        max_state_mib=settings.max_state_mib,
        bootstrap_samples=settings.bootstrap_samples,
        settings={
            "tasks": list(names),
            "lengths": list(settings.lengths),
            "samples": settings.samples,
            "seed": settings.seed,
            "max_new_tokens": settings.max_new_tokens,
            "bootstrap_samples": settings.bootstrap_samples,
            "examples": examples,
            "facts": "made" if facts is None else "bAbI files",
            "books": books.identity,
        },
    )


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


def _suite(
    name: str, tokenizer: TextTokenizer, books: Books, settings: NiahSettings, facts: Path | None, examples: bool
) -> Suite:
    stories = None if facts is None else read_stories(facts, name)
    if stories is not None and len(stories) < settings.samples:
        raise DataError(f"{facts} has {len(stories)} questions of {name}, --samples asks for {settings.samples}")
    assert settings.max_new_tokens is not None
    return Suite(
        name=name,
        upstream=name,
        haystack=books.identity,
        rows=2,
        max_new_tokens=settings.max_new_tokens,
        make=_maker(name, tokenizer, books, settings, stories, examples),
        match=lambda output, sample: float(label_match(output, sample.references[0], sample.words, LABELS[name])),
        settled=lambda output, sample: first_sentence(output) != output.lower(),  # noqa: ARG005  a sentence has ended
    )


def _maker(
    name: str,
    tokenizer: TextTokenizer,
    books: Books,
    settings: NiahSettings,
    stories: list[Story] | None,
    examples: bool,
) -> Callable[[int, int], Sample]:
    header = _INSTRUCTIONS[name]
    if examples:
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
