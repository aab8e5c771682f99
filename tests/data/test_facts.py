"""Facts and questions that are written into training rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nested_lm.config.train import Facts
from nested_lm.data.facts import FactWriter, refuse_shared_words, vocabulary
from nested_lm.data.loader import Batch
from nested_lm.data.packing import IGNORED_TARGET
from nested_lm.data.tokenizer import train_tokenizer
from nested_lm.errors import ConfigError, DataError
from nested_lm_lab.tasks.needles.haystack import NEEDLE
from nested_lm_lab.tasks.needles.niah import NiahTask
from nested_lm_lab.tasks.needles.tasks import TASKS, ask
from nested_lm_lab.tasks.needles.words import ADJECTIVES, NOUNS

CONTEXT, ROWS, PIECE = 1024, 8, 700
FILL = 3  # token of "#", which no fact has


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["the special magic number of " * 50], 270, tmp_path_factory.mktemp("t") / "tokenizer.json")


def writer(tokenizer, *, shortest_context=CONTEXT, **settings):
    given = {"share": 1.0, "every_tokens": 128, "kinds": ["note"], "distances": [0, 600]} | settings
    return FactWriter(Facts.model_validate(given), tokenizer, seed=1, shortest_context=shortest_context)


def text():
    """Two documents a row, the first of them longer, of one sign; padding at the end."""
    inputs = torch.full((ROWS, CONTEXT), FILL)
    targets = torch.full((ROWS, CONTEXT), FILL)
    targets[:, 900:] = IGNORED_TARGET
    resets = torch.zeros(ROWS, CONTEXT, dtype=torch.bool)
    resets[:, [0, PIECE]] = True
    return Batch(inputs, targets, resets)


def answers(batch):
    """Runs of scored targets that are not text: (row, first token, tokens)."""
    found = []
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        at = 1
        while at < PIECE:
            if targets[at] != IGNORED_TARGET and targets[at - 1] == IGNORED_TARGET and targets[at] != FILL:
                end = next(t for t in range(at, CONTEXT) if targets[t] == IGNORED_TARGET)
                assert targets[at:end] == inputs[at + 1 : end + 1]
                found.append((row, at + 1, targets[at:end]))
                at = end
            at += 1
    return found


def test_every_question_is_answered_by_a_fact_before_it(tokenizer):
    assert tokenizer.encode("#") == [FILL]
    batch = writer(tokenizer).write(text(), step=0, tokens=0, first_row=0)
    found = answers(batch)
    assert len(found) >= 2 * ROWS
    counts = [sum(row == own for own, _, _ in found) for row in range(ROWS)]
    assert min(counts) < 3 < 5 < max(counts) <= CONTEXT // 128
    for row, at, answer in found:
        asked = tokenizer.decode(batch.inputs[row, at - 40 : at].tolist()).rsplit("# ", 1)[-1]
        before = tokenizer.decode(batch.inputs[row, : at - 1].tolist())
        assert f"{asked}{tokenizer.decode(answer)}." in before
    assert torch.equal(batch.inputs[:, PIECE:], text().inputs[:, PIECE:])
    assert torch.equal(batch.inputs[:, 0], text().inputs[:, 0])


def test_facts_and_questions_are_not_scored_and_text_is(tokenizer):
    batch = writer(tokenizer).write(text(), step=0, tokens=0, first_row=0)
    scored = batch.targets != IGNORED_TARGET
    changed = torch.zeros_like(scored)
    changed[:, :-1] = batch.inputs[:, 1:] != FILL
    for row, at, answer in answers(batch):
        changed[row, at - 1 : at - 1 + len(answer)] = False
    assert not (changed & scored).any()
    assert (scored & (batch.targets == FILL)).float().mean() > 0.6


def test_distances_are_drawn_evenly_and_grow_with_training(tokenizer):
    def distances(tokens):
        given = writer(tokenizer, every_tokens=1024, distances=[10, 410], ramp_tokens=1000)
        found = []
        for step in range(40):
            batch = given.write(text(), step=step, tokens=tokens, first_row=0)
            for row, at, answer in answers(batch):
                written = np.flatnonzero(batch.inputs[row, :at].numpy() != FILL)
                gap = np.diff(written).max() - 1
                found.append(gap)
                assert len(answer)
        return np.array(found)

    whole, begun = distances(1000), distances(100)
    assert 10 <= whole.min() < 40
    assert 380 < whole.max() <= 410
    assert abs(whole.mean() - 210) < 25
    assert 10 <= begun.min() <= begun.max() <= 50


def test_rows_depend_on_their_place_in_the_step_alone(tokenizer):
    given, batch = writer(tokenizer, share=0.5), text()
    whole = given.write(batch, step=7, tokens=0, first_row=0)
    half = Batch(*(part[4:] for part in batch))
    assert torch.equal(given.write(half, step=7, tokens=0, first_row=4).inputs, whole.inputs[4:])
    assert not torch.equal(given.write(batch, step=8, tokens=0, first_row=0).inputs, whole.inputs)
    untouched = (whole.inputs == batch.inputs).all(1)
    assert 0 < untouched.sum() < ROWS


def test_the_wording_is_that_of_the_needle_suite_and_its_words_are_not(tokenizer):
    given = writer(tokenizer, kinds=["number"], every_tokens=256, keys=["a-b", "c-d", "e-f"])
    pair = given.draw(np.random.default_rng(0), 1)[0]
    fact, question, value = (tokenizer.decode(part.tolist()) for part in pair)
    key = fact.split(" for ")[1].split(" is:")[0]
    assert fact.strip() == NEEDLE.strip().format(kind="numbers", key=key, value=value.strip())
    asked = ask(TASKS["s1"], np.random.default_rng(0))
    assert question.strip() == asked.question.replace(asked.keys[0], key).strip()
    trained = set().union(*vocabulary())
    assert not trained & {*ADJECTIVES, *NOUNS}
    refuse_shared_words(Facts(share=1.0, every_tokens=99, distances=(0, 9)), [*ADJECTIVES, *NOUNS], source="needles")


def test_words_of_the_test_are_refused():
    facts = Facts(share=1.0, every_tokens=99, distances=(0, 9), keys=("brave-otter", "pale-quartz"))
    with pytest.raises(DataError, match=r"3 of the 4 words(?s:.*)needles too: brave, otter, pale\n(?s:.*)facts\.keys"):
        refuse_shared_words(facts, [*ADJECTIVES, *NOUNS], source="needles")


def test_the_needle_suite_refuses_a_model_that_was_trained_on_its_words():
    facts = Facts(share=1.0, every_tokens=99, distances=(0, 9), keys=("brave-otter",))
    loaded = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(facts=facts)))
    task = NiahTask(settings=None)
    refused = pytest.raises(DataError, match="are words of the needle suite too: brave, otter")
    with refused, task.opened(SimpleNamespace(loaded=loaded)):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest_context": 16}, r"up to \d+ tokens(?s:.*)0 between(?s:.*)16 tokens of the shortest context"),
        ({"shortest_context": 256, "distances": [250, 255]}, r"250 between them(?s:.*)256 tokens"),
        (
            {"every_tokens": 30},
            r"takes \d+ tokens in the mean(?s:.*)for every 30 tokens(?s:.*)every_tokens to \d+",
        ),
    ],
)
def test_facts_that_do_not_fit_are_refused_with_the_numbers(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        writer(tokenizer, **settings)
