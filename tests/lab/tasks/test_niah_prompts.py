# ruff: noqa: RUF001  sentence marks of other languages
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
def test_prompts_have_exactly_the_length_and_differ_from_their_control_by_the_needles(
    name, length, depth, seed, tokenizer, books
):
    made = sample(name, tokenizer, books, length=length, depths=(depth,), seed=seed)
    (prompt,) = made.prompts
    assert prompt.tokens.shape == (length,)
    assert prompt.tokens.dtype == np.int64
    for row in made.rows:
        assert row.tokens[0] == tokenizer.start_of_text
        assert row.tokens[-len(made.question) :].tolist() == made.question.tolist()
    text = tokenizer.decode(prompt.tokens)
    assert all(reference in text for reference in made.references)
    needles = asked_needles(name, made, tokenizer)
    left = prompt.tokens.tolist()
    for begin, needle in sorted(zip(prompt.needles, needles, strict=True), reverse=True):
        assert left[begin : begin + len(needle)] == needle
        del left[begin : begin + len(needle)]
    assert left == made.without.tokens.tolist()


def asked_needles(name, made, tokenizer):
    """Tokens of the needles that are asked for, in their order."""
    joint = haystack(name, tokenizer, Books).joint
    begin = f"{joint}VAR " if name == "vt" else f"{joint}One of the special magic "
    parts = tokenizer.decode(made.only[: -len(made.question)]).split(begin)[1 : 1 + len(made.references)]
    return [tokenizer.encode(begin + part) for part in parts]


@pytest.mark.parametrize("name", ["s1", "s2", "mk2"])
def test_depths_reach_from_the_first_sentence_to_the_last_place(name, tokenizer, books):
    made = sample(name, tokenizer, books, length=4000, depths=(0.0, 0.25, 0.5, 0.75, 1.0))
    (needle,) = asked_needles(name, made, tokenizer)
    header = len(made.only) - len(made.question) - len(needle)
    plain = 4000 - len(made.only)
    for prompt in made.prompts:
        assert (
            abs(prompt.needles[0] - header - prompt.depth * plain) <= 120
        )  # half of the longest sentence, or all of it
    assert made.prompts[-1].needles[0] == 4000 - len(made.question) - len(needle)


SURROUNDINGS = 16  # characters


def surroundings(name, tokenizer, books, count):
    """What stands before and after each needle of many prompts, and whether it is the one that is asked for."""
    joint = haystack(name, tokenizer, Books).joint
    found, asked = [], []
    for number in range(count):
        made = sample(name, tokenizer, books, length=1500, depths=INNER if name != "mk1" else DEPTHS, number=number)
        for prompt in made.prompts:
            text = tokenizer.decode(prompt.tokens[: -len(made.question)])
            for match in re.finditer(re.escape(f"{joint}One of the special magic "), text):
                end = text.index(".", match.start() + 1) + 1
                before, after = text[: match.start()][-SURROUNDINGS:], text[end:][:SURROUNDINGS]
                found.append((before.rjust(SURROUNDINGS), after.ljust(SURROUNDINGS)))
                asked.append(made.references[0] in text[match.start() : end])
    return found, np.array(asked)


INNER = (0.25, 0.5, 0.75)


def classify(features, labels):
    """Area under the curve on held-out needles of a logistic regression, trained by gradient descent."""
    half = np.arange(len(labels)) % 2 == 0
    weights = np.where(labels[half], 0.5 / labels[half].mean(), 0.5 / (1 - labels[half].mean()))
    w = np.zeros(features.shape[1])
    for _ in range(300):
        p = 1 / (1 + np.exp(-features[half] @ w))
        w -= 0.3 * (features[half].T @ (weights * (p - labels[half])) / half.sum() + 1e-3 * w)
    scores, truth = features[~half] @ w, labels[~half]
    ranks = np.searchsorted(np.sort(scores), scores) + np.searchsorted(np.sort(scores), scores, side="right") + 1
    positive = truth.sum()
    return (ranks[truth].sum() / 2 - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))


def one_hot(found):
    """Which kind of character stands at each place around a needle."""
    kinds = [
        [0 if c.isdigit() else 1 if c.isalpha() else 2 if c == "." else 3 if c == "\n" else 4 for c in before + after]
        for before, after in found
    ]
    return np.eye(5)[np.array(kinds)].reshape(len(found), -1)


@pytest.mark.parametrize("name", ["mk1", "mk2", "mk3"])
def test_nothing_around_a_needle_tells_the_one_that_is_asked_for(name, tokenizer, books):
    found, asked = surroundings(name, tokenizer, books, 150 if name == "mk1" else 40)
    features = np.hstack([one_hot(found), np.ones((len(found), 1))])
    assert abs(classify(features, asked) - 0.5) < 0.08
    # The same classifier finds what version 1 gave away: an unfinished sentence before the asked needle.
    given_away = [
        (before[:-1] + "x", after) if is_asked else (before, after)
        for (before, after), is_asked in zip(found, asked, strict=True)
    ]
    assert classify(np.hstack([one_hot(given_away), np.ones((len(found), 1))]), asked) > 0.9


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
        for prompt in sample(name, tokenizer, books, length=length, depths=(0.0, 0.5, 1.0), number=number).prompts:
            assert len(prompt.tokens) == length
            assert tokenizer.decode(prompt.tokens).count(begin) == count


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
def test_all_asked_needles_lie_in_the_text_a_chain_in_its_order(name, count, tokenizer, books):
    orders = set()
    for number in range(12):
        made = sample(name, tokenizer, books, number=number)
        (prompt,) = made.prompts
        assert len(prompt.needles) == len(made.references) == count
        text = tokenizer.decode(prompt.tokens[: -len(made.question)])
        places = [text.index(f"VAR {r} =" if name == "vt" else f"is: {r}.") for r in made.references]
        orders.add(places == sorted(places))
    assert orders == {True} if name == "vt" else False in orders  # RULER shuffles the needles of one question


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
    assert sorted(seen) == sorted(sentence.strip() for sentence in split_sentences(text))
    with pytest.raises(DataError, match=r"too short: few.txt has .* tokens"):
        next(units)
    with pytest.raises(DataError, match="too short"):
        sample("s2", tokenizer, few)


def test_sentences_that_hold_a_key_of_the_sample_are_left_out(tokenizer):
    text = "A quick-fox is here. The dog sleeps. QUICK-FOX again. Nothing else."
    found = Books(tokenizer, [Document("b", text, None, "b.txt")], origin="b.txt")
    units = found.units(np.random.default_rng(1), ("quick-fox",))
    assert sorted(tokenizer.decode(next(units).tokens).strip() for _ in range(2)) == [
        "Nothing else.",
        "The dog sleeps.",
    ]
    with pytest.raises(DataError, match="too short"):
        next(units)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("私は猫である。名前はまだ無い。「どこ？」と", [" 私は猫である。", "名前はまだ無い。", "「どこ？」", "と"]),
        ("यह है। वह था॥ नहीं", [" यह है।", " वह था॥", " नहीं"]),
        ("كيف؟ نعم۔ لا", [" كيف؟", " نعم۔", " لا"]),
        ("Go!” he said… «Да?» нет", [" Go!”", " he said…", " «Да?»", " нет"]),
        ("3.5 m. of e.g.this", [" 3.5 m.", " of e.g.this"]),
        (" \n\t", []),
    ],
)
def test_sentences_of_any_language(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("text", ["ก็" * 3000, "no mark " * 900, "e\u0301" * 2500, "。" * 50 + "x" * 4000, "🏳️‍🌈 " * 900])
def test_text_without_marks_is_cut_and_loses_nothing_and_no_character_is_cut(text, tokenizer):
    found = split_sentences(text)
    assert "".join(found) == " " + " ".join(text.split())
    assert max(map(len, found)) <= 1000
    assert not any(piece[0] in "็\u0301\u200d\ufe0f" for piece in found)
    haystack = Books(tokenizer, [Document("b", text, None, "b.txt")], origin="b.txt")
    for number in range(10):
        made = make_sample(TASKS["s2"], tokenizer, haystack, length=1500, depths=DEPTHS, seed=0, number=number)
        for prompt in made.rows:
            assert "\ufffd" not in tokenizer.decode(prompt.tokens)


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
