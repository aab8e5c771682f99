"""Prompts of needle tasks: exact lengths, exact depths, honest haystacks."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nested_lm.data.document import Document
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.tasks.needles.haystack import Books, Needles, Noise, split_sentences
from nested_lm_lab.tasks.needles.lists import make_list_sample
from nested_lm_lab.tasks.needles.prompts import make_sample
from nested_lm_lab.tasks.needles.tasks import TASKS
from nested_lm_lab.tasks.needles.words import ADJECTIVES, NOUNS, draw_numbers, draw_words

DEPTHS = (0.0, 0.3, 0.5, 1.0)
WITH_NEEDLES = [name for name, task in TASKS.items() if task.haystack is not None]
LISTS = [name for name, task in TASKS.items() if task.haystack is None]


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


@pytest.fixture(scope="module")
def books(tokenizer):
    text = " ".join(
        f"The state of the union is {word} and so are {other}." for word in NOUNS for other in ADJECTIVES[:3]
    )
    return Books(tokenizer, [Document("book", text, None, "book.txt")], origin="book.txt")


def haystack(name, tokenizer, books):
    task = TASKS[name]
    kinds = {"noise": Noise(tokenizer), "books": books, "needle": Needles(tokenizer, task.keys, task.values)}
    return kinds[task.haystack]


def sample(name, tokenizer, books, *, length=1800, depths=DEPTHS, seed=0, number=0):
    task = TASKS[name]
    if task.haystack is None:
        return make_list_sample(task, tokenizer, length=length, seed=seed, number=number)
    found = haystack(name, tokenizer, books)
    return make_sample(task, tokenizer, found, length=length, depths=depths, seed=seed, number=number)


@given(
    name=st.sampled_from(WITH_NEEDLES),
    length=st.integers(1500, 4000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@hypothesis_settings(max_examples=40)
def test_prompts_have_exactly_the_length_and_needles_the_depth_asked_for(name, length, depth, seed, tokenizer, books):
    made = sample(name, tokenizer, books, length=length, depths=(depth,), seed=seed)
    (prompt,) = made.prompts
    for row in made.rows:
        assert row.tokens.shape == (length,)
        assert row.tokens.dtype == np.int64
        assert row.tokens[0] == tokenizer.start_of_text
        assert row.tokens[-len(made.question) :].tolist() == made.question.tolist()
    text = tokenizer.decode(prompt.tokens)
    assert all(reference in text for reference in made.references)
    if not TASKS[name].has_depth:
        assert prompt.depth is None
        assert list(prompt.needles) == sorted(prompt.needles)
        return
    needle = made.only[: -len(made.question)]
    header = next(k for k in range(len(needle)) if " One of" in tokenizer.decode(needle[k : k + 12])[:7])
    size = len(needle) - header - sum(len(unit) for unit in _others(made, needle, header, tokenizer))
    assert prompt.tokens[prompt.needles[0] :][:size].tolist() == needle[header : header + size].tolist()
    around = length - header - size - len(made.question)
    assert abs(prompt.needles[0] - header - depth * around) <= 1


def _others(made, needle, header, tokenizer):
    """Tokens of the needles that are not asked for, behind the first in the prompt without text."""
    text = tokenizer.decode(needle[header:])
    parts = text.split(" One of the special magic ")[2:]
    return [tokenizer.encode(f" One of the special magic {part}") for part in parts]


def shortest_length(name, tokenizer, books):
    """What the message says of sample 0; others have other needles."""
    with pytest.raises(DataError) as refused:
        sample(name, tokenizer, books, length=90)
    return int(re.search(r"take ([\d,]+) tokens", str(refused.value))[1].replace(",", ""))


@pytest.mark.parametrize(
    ("name", "begin", "count"),
    [(name, " One of the special magic ", 4) for name in ("mk1", "mv", "mq")] + [("vt", "\nVAR ", 5)],
)
@pytest.mark.parametrize("spare", [60, 200])
def test_a_length_that_holds_the_needles_holds_them_wherever_they_fall(name, begin, count, spare, tokenizer, books):
    length = shortest_length(name, tokenizer, books) + spare
    for number in range(30):
        for prompt in sample(name, tokenizer, books, length=length, depths=(0.0, 1.0), number=number).prompts:
            assert len(prompt.tokens) == length
            assert tokenizer.decode(prompt.tokens).count(begin) == count
            assert list(prompt.needles) == sorted(prompt.needles)


def test_needles_that_fit_on_neither_side_of_the_asked_one_are_refused(tokenizer, books):
    length = shortest_length("mk1", tokenizer, books) + 10
    assert len(sample("mk1", tokenizer, books, length=length, depths=(0.0, 1.0)).prompts) == 2
    with pytest.raises(DataError, match="no room for all needles of task mk1 on either side"):
        sample("mk1", tokenizer, books, length=length, depths=(0.5,))


@pytest.mark.parametrize("name", list(TASKS))
def test_without_the_needles_no_answer_stands_in_the_text(name, tokenizer, books):
    for number in range(3):
        made = sample(name, tokenizer, books, number=number)
        text = tokenizer.decode(made.without.tokens[: -len(made.question)])
        assert not any(reference in text for reference in made.references)
        assert tokenizer.decode(made.answer).startswith(" ")
        assert all(reference in tokenizer.decode(made.answer) for reference in made.references)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_seed_gives_one_sample_and_no_other(name, tokenizer, books):
    first, again = (sample(name, tokenizer, books, seed=5, number=2) for _ in range(2))
    for a, b in zip(first.rows, again.rows, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
    for changed in ({"seed": 6}, {"number": 3}, {"length": 1801}):
        other = sample(name, tokenizer, books, **({"seed": 5, "number": 2} | changed))
        assert other.references != first.references


def test_depths_of_a_sample_change_nothing_else(tokenizer, books):
    one = sample("s2", tokenizer, books, depths=(0.5,))
    several = sample("s2", tokenizer, books, depths=(0.0, 0.5, 0.9))
    assert one.prompts[0].tokens.tolist() == several.prompts[1].tokens.tolist()
    deep, without = several.prompts[2].tokens, several.without.tokens
    shared = int((deep != without).argmax())
    assert shared > 0.8 * several.prompts[2].needles[0]  # up to the last whole sentence before the needle


def test_four_keys_and_one_of_them_is_asked_for(tokenizer, books):
    made = sample("mk1", tokenizer, books)
    for prompt in made.prompts:
        text = tokenizer.decode(prompt.tokens)
        assert text.count("One of the special magic numbers for") == 4
        assert text.count(f"is: {made.references[0]}.") == 1
    assert tokenizer.decode(made.without.tokens).count("One of the special magic numbers for") == 3


@pytest.mark.parametrize("name", ["mk2", "mk3"])
def test_a_haystack_of_needles_has_every_key_once_and_cuts_none(name, tokenizer, books):
    text = tokenizer.decode(sample(name, tokenizer, books, length=6000).prompts[1].tokens)
    found = [part.split(" is: ") for part in text.split(f"magic {TASKS[name].values} for ")[1:]]
    assert len(found) > 15
    assert all(len(part) == 2 and "." in part[1] for part in found)
    assert max(Counter(part[0] for part in found).values()) == 1


@pytest.mark.parametrize(("name", "count"), [("mv", 4), ("mq", 4), ("vt", 5)])
def test_all_asked_needles_lie_in_the_text_in_order(name, count, tokenizer, books):
    made = sample(name, tokenizer, books)
    (prompt,) = made.prompts
    assert len(prompt.needles) == len(made.references) == count
    text = tokenizer.decode(prompt.tokens[: -len(made.question)])
    places = [text.index(f"VAR {r} =" if name == "vt" else f"is: {r}.") for r in made.references]
    assert places == sorted(places)


def test_common_words_are_the_most_common_ones(tokenizer, books):
    for length, often, seldom in ((1800, 6, 1), (8192, 30, 3)):
        made = sample("cwe", tokenizer, books, length=length)
        text = tokenizer.decode(made.prompts[0].tokens[: -len(made.question)]).split("most often.\n")[1]
        counts = Counter(word for word in text.split() if "-" in word and word.split("-")[1] in NOUNS)
        assert {word for word, _ in counts.most_common(10)} == set(made.references)
        assert {counts[word] for word in made.references} == {often}
        assert counts.most_common(11)[10][1] == seldom


def test_a_list_of_common_words_is_filled_whatever_its_last_words_are(tokenizer, books):
    for length in range(6000, 6020):
        assert len(sample("cwe", tokenizer, books, length=length, number=3).prompts[0].tokens) == length


def test_coded_words_follow_the_dots_in_frequency(tokenizer, books):
    made = sample("fwe", tokenizer, books, length=4000)
    text = tokenizer.decode(made.prompts[0].tokens[: -len(made.question)]).split("coded words.")[1]
    ranked = [word for word, _ in Counter(text.split()).most_common(4)]
    assert ranked[0] == "...."
    assert tuple(ranked[1:]) == made.references


def test_a_length_without_room_is_refused_with_the_shortest_that_has_it(tokenizer, books):
    for name in TASKS:
        with pytest.raises(DataError, match=f"no room for task {name}"):
            sample(name, tokenizer, books, length=90)


def test_books_give_each_sentence_once_and_end_with_an_error(tokenizer):
    text = "One is here. Two is there! Three? Four is last."
    few = Books(tokenizer, [Document("few", text, None, "few.txt")], origin="few.txt")
    units = few.units(np.random.default_rng(1), ())
    seen = [tokenizer.decode(next(units).tokens).strip() for _ in range(4)]
    assert sorted(seen) == sorted(split_sentences(text))
    with pytest.raises(DataError, match=r"too short: few.txt has .* tokens"):
        next(units)
    with pytest.raises(DataError, match="too short"):
        sample("s2", tokenizer, few)


def test_a_haystack_that_holds_every_answer_is_refused(tokenizer, monkeypatch):
    numbers = " ".join(f"{n} is there." for n in range(10, 100))
    known = Books(tokenizer, [Document("n", numbers * 3, None, "n.txt")], origin="n.txt")
    monkeypatch.setattr(
        "nested_lm_lab.tasks.needles.tasks.draw_numbers", lambda rng, count: draw_numbers(rng, count, digits=1)
    )
    with pytest.raises(DataError, match="in the haystack already"):
        sample("s2", tokenizer, known)


def test_keys_are_different_and_there_are_enough_for_half_a_million_tokens():
    keys = draw_words(np.random.default_rng(0), 50_000)
    assert len(set(keys)) == 50_000
    with pytest.raises(ValueError, match="different keys"):
        draw_words(np.random.default_rng(0), 10**7)
