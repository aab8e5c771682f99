"""Changing facts: an invented world of entities with attributes, told in epochs; each one changes a share of them.

The reader is then asked for every fact: has it taken up the new value, kept what did not change, or does it still
prefer what is no longer true (stale)?

A synthetic twin of TemporalWiki, arXiv 2204.14211.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.tasks.continual.choices import choice_tokens, read_stream, score_choices
from nested_lm_lab.tasks.continual.invented import make_words
from nested_lm_lab.tasks.continual.schema import FactsEpoch, FactsMetrics
from nested_lm_lab.tasks.continual.settings import ContinualSettings

VERSION = "1"

VALUES = ("red", "blue", "green", "white", "black", "grey", "brown", "gold")
"""What an attribute can be: the same for all, so that no value gives its attribute away."""

ATTRIBUTES = ("coat", "house", "ship", "horse", "flag", "gate")

TOLD = (
    "The {attribute} of {entity} is {value}.",
    "{entity} has a {attribute} that is {value}.",
    "As all know, the {attribute} of {entity} is {value}.",
)
ASKED = "The {attribute} of {entity} is"
PARAPHRASE = "Asked about the {attribute} that {entity} owns, people say it is"

Fact = tuple[str, str]
World = dict[Fact, str]


@dataclass(frozen=True)
class Epoch:
    """Facts as they are in an epoch, those it changed with the value before, and what is told of them."""

    world: World
    before: World
    sentences: tuple[str, ...]


def make_epochs(settings: ContinualSettings) -> list[Epoch]:
    """Tell a world in epochs. Each after the first gives a share of the facts, drawn at random, another value.

    Every epoch tells every fact `mentions` times in mixed order, so that an update is no rarer than what stays.
    """
    rng = random.Random(f"{settings.seed}/facts")
    names = [word.capitalize() for word in make_words(settings.entities, rng, taken=set())]
    facts = [(name, attribute) for name in names for attribute in ATTRIBUTES[: settings.attributes]]
    world = {fact: rng.choice(VALUES) for fact in facts}
    changed = max(1, round(settings.changed_share * len(facts)))
    epochs = []
    for number in range(settings.epochs):
        before: World = {}
        if number:
            before = {fact: world[fact] for fact in rng.sample(facts, changed)}
            for fact, old in before.items():
                world[fact] = rng.choice([value for value in VALUES if value != old])
        told = [
            rng.choice(TOLD).format(entity=entity, attribute=attribute, value=world[entity, attribute])
            for _ in range(settings.mentions)
            for entity, attribute in facts
        ]
        rng.shuffle(told)
        epochs.append(Epoch(dict(world), before, tuple(told)))
    return epochs


def judge(
    nats: np.ndarray, paraphrased: np.ndarray, epoch: Epoch, facts: Sequence[Fact], bootstrap: Bootstrap
) -> FactsEpoch:
    """Shares of one epoch from the mean nats (facts, values) of every value, asked as told and in other words."""
    current = np.array([VALUES.index(epoch.world[fact]) for fact in facts])
    is_changed = np.array([fact in epoch.before for fact in facts])
    row = np.arange(len(facts))
    right = (nats.argmin(axis=1) == current).astype(np.float64)
    old = np.array(
        [VALUES.index(epoch.before[fact]) for fact, c in zip(facts, is_changed, strict=True) if c], dtype=int
    )
    stale = (nats[is_changed, old] < nats[is_changed, current[is_changed]]).astype(np.float64)

    def share(values: np.ndarray) -> Interval | None:
        return bootstrap.mean(values) if len(values) else None

    everything, asked_otherwise = share(right), share((paraphrased.argmin(axis=1) == current).astype(np.float64))
    assert everything is not None
    assert asked_otherwise is not None
    return FactsEpoch(
        updated=share(right[is_changed]),
        stale=share(stale),
        unchanged=share(right[~is_changed]) if epoch.before else None,
        current=everything,
        paraphrase=asked_otherwise,
        nats=bootstrap.mean(nats[row, current]),
    )


def measure(
    model: LanguageModel, tokenizer: TextTokenizer, settings: ContinualSettings, progress: Progress
) -> FactsMetrics:
    """Read the epochs one after the other into one stream, asking forks of it after each."""
    epochs = make_epochs(settings)
    facts = list(epochs[0].world)
    bootstrap = Bootstrap(settings.bootstrap_samples)

    told = [[tokenizer.encode(sentence) for sentence in epoch.sentences] for epoch in epochs]
    answers = [tokenizer.encode(f" {value}.") for value in VALUES]
    contexts = {
        question: [
            np.concatenate(
                [[tokenizer.start_of_text], tokenizer.encode(question.format(entity=entity, attribute=attribute))]
            )
            for entity, attribute in facts
        ]
        for question in (ASKED, PARAPHRASE)
    }
    progress.total += sum(len(document) + 1 for documents in told for document in documents)
    progress.total += (len(epochs) + 1) * sum(choice_tokens(each, answers) for each in contexts.values())

    def asked(state: StreamState | None, question: str) -> np.ndarray:
        return score_choices(
            model, state, contexts[question], answers, batch_size=settings.batch_size, progress=progress
        )

    unread = judge(asked(None, ASKED), asked(None, PARAPHRASE), epochs[0], facts, bootstrap).current
    state, found = None, []
    for epoch, documents in zip(epochs, told, strict=True):
        state = read_stream(
            model,
            state,
            documents,
            start=tokenizer.start_of_text,
            max_state_mib=settings.max_state_mib,
            progress=progress,
        )
        found.append(judge(asked(state, ASKED), asked(state, PARAPHRASE), epoch, facts, bootstrap))
    assert state is not None
    return FactsMetrics(
        kind="changing_facts",
        epochs=tuple(found),
        unread=unread,
        chance=1 / len(VALUES),
        stale_chance=0.5,
        tokens_read=state.position,
        state_bytes=state.num_bytes(),
    )
