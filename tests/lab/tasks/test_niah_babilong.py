"""Facts hidden in books: stories, prompts and the scorer."""

import numpy as np
import pytest

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError
from nested_lm_lab.evaluation.options import read_settings
from nested_lm_lab.tasks.needles.babilong import LABELS, babilong_suites, first_sentence, label_match
from nested_lm_lab.tasks.needles.haystack import Books
from nested_lm_lab.tasks.needles.settings import BabilongSettings
from nested_lm_lab.tasks.needles.stories import PLACES, make_story, read_stories

BABI = """1 John travelled to the hallway.
2 Mary journeyed to the bathroom.
3 Where is John? \thallway\t1
4 Daniel went back to the bathroom.
5 John moved to the bedroom.
6 Where is John? \tbedroom\t5
1 Sandra went to the office.
2 Where is Sandra? \toffice\t1
"""


@pytest.fixture
def tokenizer(data_config):
    from pathlib import Path

    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


@pytest.fixture
def facts(tmp_path):
    (tmp_path / "qa1_test.txt").write_text(BABI)
    return tmp_path


def settings(**changed):
    return read_settings(BabilongSettings, {"tasks": "qa1", "lengths": "700,900", "samples": 2} | changed)


def suite(tokenizer, tmp_path, **changed):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Chapter {n} tells of ships and storms at sea." for n in range(400)))
    (found,) = babilong_suites(tokenizer, Books.open(tokenizer, [book]), settings(**changed))
    return found


def test_stories_are_read_with_every_fact_before_their_question(facts):
    first, second, third = read_stories(facts, "qa1")
    assert first.facts == ("John travelled to the hallway.", "Mary journeyed to the bathroom.")
    assert (first.question, first.answer, first.supports) == ("Where is John?", "hallway", (0,))
    assert len(second.facts) == 4
    assert (second.answer, second.supports) == ("bedroom", (3,))
    assert third.facts == ("Sandra went to the office.",)


def test_files_that_are_no_stories_are_refused(facts):
    with pytest.raises(DataError, match=r"holds no file qa2_\*test.txt"):
        read_stories(facts, "qa2")
    (facts / "qa2_test.txt").write_text("A book, not a story.\n")
    with pytest.raises(DataError, match=r"qa2_test\.txt:1 is not a line of a bAbI task"):
        read_stories(facts, "qa2")
    (facts / "qa1_more_test.txt").write_text(BABI)
    with pytest.raises(DataError, match="holds 2 files"):
        read_stories(facts, "qa1")


@pytest.mark.parametrize("task", ["qa1", "qa2"])
def test_answers_of_made_stories_follow_from_their_facts(task):
    """Replay every story with rules of its own: who moves takes along what they hold."""
    answers = set()
    for seed in range(300):
        story = make_story(task, np.random.default_rng(seed))
        where, held, lying = {}, {}, {}
        for fact in story.facts:
            words = fact.rstrip(".").removesuffix(" there").split()
            person, thing = words[0], words[-1]
            if thing in PLACES:
                where[person] = thing
            elif any(verb in fact for verb in ("dropped", "put down", "left")):
                assert held.pop(thing) == person
                lying[thing] = where[person]
            else:
                assert thing not in held
                assert lying.pop(thing, where[person]) == where[person]
                held[thing] = person
        subject = story.question.rstrip("?").split()[-1]
        found = where[subject] if task == "qa1" else where[held[subject]] if subject in held else lying[subject]
        assert story.answer == found
        assert all(0 <= index < len(story.facts) for index in story.supports)
        assert any(story.answer in story.facts[index] for index in story.supports)
        answers.add(story.answer)
    assert answers == set(PLACES)  # no place is never the answer


@pytest.mark.parametrize("examples", [False, True])
def test_facts_lie_in_the_book_in_order_and_the_text_has_its_length(tokenizer, tmp_path, examples):
    sample = suite(tokenizer, tmp_path, examples=examples).make(900, 0)
    (prompt,) = sample.prompts
    assert len(prompt.tokens) == 900 > len(sample.without.tokens)
    text = tokenizer.decode(prompt.tokens)
    assert text.startswith("<|endoftext|>Facts about where people are")
    assert text.count("Example:") == 2 * examples
    assert text.endswith(f"Question: {sample.words}\nAnswer:")
    assert tokenizer.decode(sample.answer) == f" {sample.references[0]}"
    support = tokenizer.decode(prompt.tokens[prompt.needles[-1] :][:60])
    assert sample.references[0] in support.split(".")[0]
    without = tokenizer.decode(sample.without.tokens[: -len(sample.question)]).split("Text:\n")[1]
    assert not any(place in without for place in PLACES)


def test_questions_from_files_come_once_and_in_the_same_order_at_every_length(tokenizer, tmp_path, facts):
    made = suite(tokenizer, tmp_path, facts=facts, samples=3)
    short, long = ([made.make(length, number).references for number in range(3)] for length in (700, 900))
    assert short == long
    assert sorted(short) == [("bedroom",), ("hallway",), ("office",)]
    with pytest.raises(DataError, match="3 questions of qa1, --samples asks for 4"):
        suite(tokenizer, tmp_path, facts=facts, samples=4)


@pytest.mark.parametrize(
    ("output", "target", "question", "found"),
    [
        (" kitchen", "kitchen", "Where is Mary?", True),
        (" The most recent location of Mary is Kitchen. Not the office.", "kitchen", "Where is Mary?", True),
        (" kitchen or office", "kitchen", "Where is Mary?", False),
        (" office", "kitchen", "Where is Mary?", False),
        (" before the kitchen it was in the garden", "garden", "Where was the apple before the kitchen?", True),
        (" nowhere. kitchen", "kitchen", "Where is Mary?", False),
        (" garden <example> kitchen", "garden", "Where is Mary?", True),
    ],
)
def test_the_first_sentence_must_name_the_target_and_no_other_label(output, target, question, found):
    assert label_match(output, target, question, LABELS["qa1"]) == found


def test_an_answer_is_settled_when_its_sentence_ends(tokenizer, tmp_path):
    made = suite(tokenizer, tmp_path)
    sample = made.make(700, 0)
    assert not made.settled(" The kitchen", sample)
    assert made.settled(" The kitchen.", sample)
    assert first_sentence(" The Kitchen. And") == " the kitchen"
    assert made.match(f" {sample.references[0]}", sample) == 1.0


def test_tasks_without_facts_are_refused():
    with pytest.raises(ConfigError, match="facts are not made here, only those of qa1, qa2"):
        settings(tasks="qa3")
    with pytest.raises(ConfigError, match="unknown task 'qa9'; choices: qa1, qa2"):
        settings(tasks="qa9")
    with pytest.raises(ConfigError, match="--tasks: ',' names nothing"):
        settings(tasks=",")
