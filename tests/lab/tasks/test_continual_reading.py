"""Classes, facts and languages learned by reading: protocols checked with readers whose answers are known."""

import gzip
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_lm.errors import CheckpointError, ConfigError, DataError, NumericsError
from nested_lm.nn.state import iterate_tensors
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.tasks.continual import class_incremental, class_sets, facts, languages
from nested_lm_lab.tasks.continual.bag_of_words import NearestClassMean
from nested_lm_lab.tasks.continual.choices import read_stream, score_choices
from nested_lm_lab.tasks.continual.class_sets import ClassSet, read_class_set, shuffled_groups
from nested_lm_lab.tasks.continual.settings import ContinualSettings

SETTINGS = ContinualSettings(bootstrap_samples=100)
BOOTSTRAP = Bootstrap(100)


def tokens(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 300, size=length) for length in lengths]


@pytest.mark.parametrize("kind", ["attention", "self_modifying"])
class TestChoices:
    def test_equals_each_answer_read_whole(self, make_model, kind):
        model = make_model(kind)
        state = read_stream(model, None, tokens(5, 9), start=0, max_state_mib=64)
        contexts, choices = tokens(3, 6, 3), tokens(1, 4, 2)
        found = score_choices(model, state, contexts, choices, batch_size=2)
        as_lists = [choice.tolist() for choice in choices]
        np.testing.assert_array_equal(score_choices(model, state, contexts, as_lists, batch_size=2), found)
        for row, context in enumerate(contexts):
            for column, choice in enumerate(choices):
                text = torch.from_numpy(np.concatenate([context, choice]))[None]
                with torch.no_grad():
                    likelihood = model(text, state=state).logits[0].log_softmax(dim=-1)
                nats = -likelihood[torch.arange(len(context) - 1, len(text[0]) - 1), text[0, len(context) :]].mean()
                assert found[row, column] == pytest.approx(float(nats), rel=1e-4)

    def test_asking_writes_nothing(self, make_model, kind):
        model = make_model(kind)
        state = read_stream(model, None, tokens(9), start=0, max_state_mib=64)
        before = [tensor.clone() for tensor in iterate_tensors(state.layers)]
        first = score_choices(model, state, tokens(4, 4), tokens(2, 3), batch_size=2)
        assert all(torch.equal(a, b) for a, b in zip(before, iterate_tensors(state.layers), strict=True))
        again = score_choices(model, state, tokens(4, 4), tokens(2, 3), batch_size=2)
        np.testing.assert_array_equal(first, again)

    def test_a_state_that_outgrows_its_limit_is_refused(self, make_model, kind):
        with pytest.raises(CheckpointError, match="after 11 tokens, the limit is 0 bytes"):
            read_stream(make_model(kind), None, tokens(10), start=0, max_state_mib=0)

    def test_likelihoods_that_are_not_finite_are_refused(self, make_model, kind):
        model = make_model(kind)
        with torch.no_grad():
            model.embedding.weight.fill_(float("nan"))
        with pytest.raises(NumericsError, match=r"not finite.*parameter embedding.weight"):
            score_choices(model, None, tokens(3), tokens(1, 1), batch_size=1)


CLINC = {
    "train": [[f"{word} {i}", label] for label, word in (("pay_bill", "pay"), ("go_home", "go")) for i in range(6)],
    "test": [["please pay it", "pay_bill"], ["go away", "go_home"]],
    "oos_test": [["what", "oos"]],
}


def write_clinc(folder):
    folder.mkdir(parents=True)
    (folder / "data_full.json.gz").write_bytes(gzip.compress(json.dumps(CLINC).encode()))
    (folder / "domains.json").write_text(json.dumps({"money": ["pay bill"], "ways": ["go home"]}))


class TestClassSets:
    def test_a_copy_that_is_not_known_must_be_accepted(self, tmp_path):
        write_clinc(tmp_path / "clinc150")
        with pytest.raises(DataError, match=r"no known copy.*\n.*--class-hash ([0-9a-f]{16})") as refused:
            read_class_set("clinc150", tmp_path)
        accepted = str(refused.value).split("--class-hash ")[1][:16]
        found = read_class_set("clinc150", tmp_path, accept_hash=accepted)
        assert found.groups == (("pay_bill",), ("go_home",))
        assert (len(found.train), found.test[0]) == (12, ("please pay it", "pay_bill"))
        (tmp_path / "clinc150" / "data_full.json.gz").write_bytes(
            gzip.compress(json.dumps(CLINC | {"test": [["other", "go_home"]]}).encode())
        )
        with pytest.raises(DataError, match="no known copy"):
            read_class_set("clinc150", tmp_path, accept_hash=accepted)

    def test_csv_and_parquet_of_the_same_rows_are_the_same_set(self, tmp_path, monkeypatch):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        labels = [f"class_{i}" for i in range(7)]
        rows = [(f"text, {i}", label) for i, label in enumerate(labels)]
        plain, hub = tmp_path / "a" / "banking77", tmp_path / "b" / "banking77"
        plain.mkdir(parents=True)
        (hub / "data").mkdir(parents=True)
        names = sorted(labels)
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        for split in ("train", "test"):
            lines = ["text,category", *(f'"{text}",{label}' for text, label in rows)]
            (plain / f"{split}.csv").write_text("\n".join(lines) + "\n")
            columns = {"text": [text for text, _ in rows], "label": [names.index(label) for _, label in rows]}
            table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
            parquet.write_table(table, hub / "data" / f"{split}-00000-of-00001.parquet")
        monkeypatch.setattr(
            class_sets,
            "SETS",
            {
                "banking77": class_sets.SETS["banking77"].__class__(
                    class_sets._read_banking, class_sets._group_banking, {}
                )
            },
        )
        hashes = []
        for folder in ("a", "b"):
            with pytest.raises(DataError) as refused:
                read_class_set("banking77", tmp_path / folder)
            hashes.append(str(refused.value).split("--class-hash ")[1][:16])
        assert hashes[0] == hashes[1]
        found = read_class_set("banking77", tmp_path / "b", accept_hash=hashes[0])
        assert found.groups == tuple((label,) for label in labels)

    def test_dbpedia_counts_from_one_and_takes_names_from_its_own_list(self, tmp_path, monkeypatch):
        folder = tmp_path / "dbpedia14"
        folder.mkdir()
        (folder / "train.csv").write_text("".join(f'"{i}","title {i}"," text {i}"\n' for i in range(1, 15)))
        (folder / "test.csv").write_text("".join(f'"{i}","x"\n' for i in range(1, 15)))
        with pytest.raises(DataError) as refused:
            read_class_set("dbpedia14", tmp_path)
        accepted = str(refused.value).split("--class-hash ")[1][:16]
        found = read_class_set("dbpedia14", tmp_path, accept_hash=accepted)
        assert found.train[1] == ("text 2", "educational institution")
        assert (found.groups[0], len(found.groups)) == (("company", "educational institution"), 7)

    @pytest.mark.parametrize(
        ("name", "file", "content", "message"),
        [
            ("clinc150", "data_full.json", "{", "is not JSON"),
            ("clinc150", "data_full.json", "{}", "no lists `train` and `test`"),
            ("banking77", "train.csv", "a,b\n1,2\n", "expected the columns text,category"),
            ("banking77", "other.csv", "", "holds neither train.csv"),
            ("dbpedia14", "train.csv", '"15","x"\n', "a class is no number from 1 to 14"),
            ("clinc150", "data_full.json.gz", "no gzip", "cannot be read"),
        ],
    )
    def test_damaged_folders_are_named(self, tmp_path, name, file, content, message):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
        with pytest.raises(DataError, match=message):
            read_class_set(name, tmp_path)

    def test_a_set_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match="is not a folder"):
            read_class_set("clinc150", tmp_path)
        with pytest.raises(DataError, match="unknown class set"):
            read_class_set("mnist", tmp_path)

    def test_random_orders_keep_the_sizes_and_all_classes(self):
        groups = (("a", "b", "c"), ("d", "e"))
        found = shuffled_groups(groups, seed=1)
        assert [len(group) for group in found] == [3, 2]
        assert sorted(label for group in found for label in group) == list("abcde")
        assert found == shuffled_groups(groups, seed=1) != shuffled_groups(groups, seed=2)


class TestNearestClassMean:
    def test_words_decide_and_common_ones_weigh_less(self):
        means = NearestClassMean()
        for text, label in (("the cat sat", "cat"), ("the cat ran", "cat"), ("the dog sat", "dog"), ("the dog", "dog")):
            means.learn(text, label)
        assert means.classify(["a cat", "The DOG!", "the cat sat"]) == ["cat", "dog", "cat"]

    def test_the_order_of_examples_does_not_matter(self):
        rows = [(f"{label} {i} words {i % 3}", label) for label in "abc" for i in range(5)]
        forward, backward = NearestClassMean(), NearestClassMean()
        for text, label in rows:
            forward.learn(text, label)
        for text, label in reversed(rows):
            backward.learn(text, label)
        texts = ["b 3 words", "words 1 c", "a"]
        assert forward.classify(texts) == backward.classify(texts)

    def test_an_unknown_text_gets_some_class(self):
        means = NearestClassMean()
        means.learn("x", "only")
        assert means.classify(["never seen"]) == ["only"]


class Recency:
    """Knows the classes of the last task only."""

    def __init__(self):
        self.last = ()

    def learn(self, examples):
        self.last = {label for _, label in examples}

    def classify(self, texts, classes):
        return [text.split()[-1] if text.split()[-1] in self.last else classes[0] for text in texts]


def make_set():
    labels = list("abcdef")
    rows = [(f"{i} is {label}", label) for label in labels for i in range(8)]
    return ClassSet("toy", rows, rows, (("a", "b"), ("c", "d"), ("e", "f")), "0" * 16)


class TestClassIncremental:
    def test_shots_and_tests_do_not_depend_on_the_order_of_tasks(self):
        data = make_set()
        options = {"shots": 3, "tests_per_class": 2, "seed": 0}
        given = class_incremental.make_tasks(data, data.groups, **options)
        other = class_incremental.make_tasks(data, data.groups[::-1], **options)
        assert [len(task.examples) for task in given] == [6, 6, 6]
        assert sorted(row for task in given for row in task.examples) == sorted(
            row for task in other for row in task.examples
        )
        assert given[0].tests == other[2].tests
        assert {label for _, label in given[1].examples} == {"c", "d"}

    def test_a_reader_that_keeps_the_last_task_alone_forgets_the_rest(self):
        data = make_set()
        tasks = class_incremental.make_tasks(data, data.groups, shots=2, tests_per_class=2, seed=0)
        right = class_incremental.run_stream(Recency(), tasks)
        assert np.isnan(right[2][:, :2]).all()
        scores = class_incremental.summarise(right, BOOTSTRAP)
        # Of the first task, half is right for good: what is not known is called "a".
        assert scores.matrix == ((1.0,), (0.5, 1.0), (0.5, 0.0, 1.0))
        assert scores.accuracy.value == pytest.approx(0.5)
        assert scores.backward_transfer.value == pytest.approx(-0.75)
        assert scores.forgetting.value == pytest.approx(0.75)
        assert scores.plasticity.value == 1.0
        assert scores.incremental.value == pytest.approx((1.0 + 0.75 + 0.5) / 3)

    def test_a_whole_stream(self, make_model, tokenizer):
        data = make_set()
        settings = SETTINGS.model_copy(update={"tests_per_class": 1, "random_orders": 1, "shots": (1,)})
        progress = Progress(0, print)
        found = class_incremental.measure(make_model("self_modifying"), tokenizer, [data], settings, progress)
        assert progress.done == progress.total > 2 * (given_tokens := found.streams[0].tokens_read)
        assert given_tokens == found.streams[1].tokens_read
        given, random_order = found.streams
        assert (given.order, random_order.order) == ("given", "random 1")
        assert [len(row) for row in given.model.matrix] == [1, 2, 3]
        assert given.chance == pytest.approx(1 / 6)
        assert given.floor.accuracy.value == 1.0
        assert given.above_floor.value == pytest.approx(given.model.accuracy.value - 1.0)
        assert given.tokens_read > 6
        assert given.tests == 6

    def test_names_are_read_as_words(self):
        assert class_incremental.readable("card_arrival?") == "card arrival"


@pytest.fixture(scope="module")
def tokenizer(data_config):
    from nested_lm.data.tokenizer import TextTokenizer

    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


class TestFacts:
    def test_each_epoch_changes_its_share_and_tells_everything(self):
        epochs = facts.make_epochs(SETTINGS)
        assert len(epochs[0].world) == 60
        assert epochs[0].before == {}
        for before, after in itertools.pairwise(epochs):
            changed = {fact for fact, value in after.world.items() if value != before.world[fact]}
            assert changed == set(after.before)
            assert len(changed) == 12
            assert all(before.world[fact] == old for fact, old in after.before.items())
            assert len(after.sentences) == 120
        assert epochs == facts.make_epochs(SETTINGS)
        asked = {facts.PARAPHRASE.format(entity="x", attribute="y").split("x")[0]}
        assert not any(sentence.startswith(tuple(asked)) for sentence in epochs[0].sentences)

    def test_who_answers_with_what_was_true_is_stale(self):
        before, after = facts.make_epochs(SETTINGS)[:2]
        known = list(after.world)

        def nats_of(world):
            return np.array([[0.0 if value == world[fact] else 1.0 for value in facts.VALUES] for fact in known])

        def judged(world):
            return facts.judge(nats_of(world), nats_of(world), after, known, BOOTSTRAP)

        current, stale = judged(after.world), judged(before.world)
        assert (current.updated.value, current.stale.value, current.unchanged.value) == (1.0, 0.0, 1.0)
        assert (stale.updated.value, stale.stale.value, stale.unchanged.value) == (0.0, 1.0, 1.0)
        assert stale.current.value == pytest.approx(48 / 60)
        assert current.paraphrase.value == 1.0
        first = facts.judge(nats_of(before.world), nats_of(before.world), before, known, BOOTSTRAP)
        assert (first.updated, first.stale, first.unchanged) == (None, None, None)


class TestLanguages:
    def test_lessons_and_tests_are_apart_and_the_tables_disjoint(self):
        a, b = languages.make_languages(SETTINGS)
        assert not {english for _, english in a.lessons} & {english for _, english in a.tests}
        assert [english for _, english in a.tests] == [english for _, english in b.tests]
        words = [{word for foreign, _ in (*x.lessons, *x.tests) for word in foreign.split()} for x in (a, b)]
        english = {word for _, text in a.lessons for word in text.split()}
        assert not words[0] & words[1]
        assert not (words[0] | words[1]) & english

    def test_a_language_is_a_table_and_an_order(self):
        a, _ = languages.make_languages(SETTINGS)
        table = {}
        for foreign, english in (*a.lessons, *a.tests):
            words = [word for word in english.split() if word != "the"]
            for place, word in zip(languages.ORDERS["A"], foreign.split(), strict=True):
                assert table.setdefault(words[place], word) == word

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"vocabulary": 60}, "there are 28; use fewer"),
            ({"vocabulary": 8, "lesson_sentences": 500}, "use more words or fewer sentences"),
        ],
    )
    def test_impossible_sizes_are_refused(self, change, message):
        with pytest.raises(ConfigError, match=message):
            languages.make_languages(SETTINGS.model_copy(update=change))

    def test_chrf_is_that_of_sacrebleu(self):
        sacrebleu = pytest.importorskip("sacrebleu")
        found = languages.sentence_chrf(["the old man", ""], ["the old man", "a king"])
        assert found[0] == pytest.approx(100.0)
        assert found[1] == 0.0
        near = languages.sentence_chrf(["the old men"], ["the old man"])[0]
        assert near == sacrebleu.sentence_chrf("the old men", ["the old man"]).score
        assert 0 < near < 100

    def test_both_languages_at_four_moments(self, make_model, tokenizer):
        pytest.importorskip("sacrebleu")
        settings = SETTINGS.model_copy(update={"lesson_sentences": 2, "test_sentences": 2})
        progress = Progress(0, print)
        found = languages.measure(make_model("self_modifying"), tokenizer, settings, progress)
        assert progress.done == progress.total > 2 * found.tokens_read
        assert found.a.kept.value == pytest.approx(found.a.first_then_other.chrf.value - found.a.alone.chrf.value)
        assert found.b.unread.nats.value != found.b.alone.nats.value
        assert found.a.first_then_other.nats.value != found.a.other_then_this.nats.value
        assert found.copy_chrf.value < 50

    def test_without_sacrebleu_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(ConfigError, match=r"pip install .* -e '\.\[eval\]'"):
            languages.require_chrf()
