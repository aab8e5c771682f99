"""Tasks over tokens of the learning suite: labels against brute force."""

import pytest
import torch
from benchmarks.learning.protocol import IGNORED, Progress
from benchmarks.learning.recall import MARK, MQAR, Recall, _answers
from benchmarks.learning.tasks import KEYS, TOKEN_TASKS

TASKS = {task.name: task for task in TOKEN_TASKS}


def made(name, batch=16, length=None):
    task = TASKS[name]
    length = length or task.train_lengths[1]
    return task.make(batch, length, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TASKS)
def test_tokens_and_targets_are_in_the_vocabulary_and_seeded(name):
    tokens, targets = made(name)
    again, _ = made(name)
    assert tokens.shape == targets.shape
    assert torch.equal(tokens, again)
    assert tokens.min() >= 0
    assert tokens.max() < TASKS[name].vocab
    scored = targets[targets != IGNORED]
    assert scored.numel()
    assert scored.min() >= 0
    assert scored.max() < TASKS[name].vocab


def test_parity():
    tokens, targets = made("parity")
    assert all(
        sum(row[: t + 1]) % 2 == y
        for row, ys in zip(tokens.tolist(), targets.tolist(), strict=True)
        for t, y in enumerate(ys)
    )


@pytest.mark.parametrize(("name", "word"), [("aa_star", "11"), ("abab_star", "1212")])
def test_repeated_words(name, word):
    tokens, targets = made(name, batch=1, length=23)
    for t in range(23):
        read = "".join(map(str, tokens[0, 1 : t + 1].tolist()))
        may_end = len(read) % len(word) == 0
        assert read == (word * 12)[: len(read)]
        assert (targets[0, t].item() == 0) == may_end


@pytest.mark.parametrize(("name", "symbols"), [("a_n_b_n", 2), ("a_n_b_n_c_n", 3)])
def test_counters(name, symbols):
    tokens, targets = made(name)
    for row, classes in zip(tokens.tolist(), targets.tolist(), strict=True):
        n = row.count(1)
        text = [s for s in row[1:] if s]
        assert text == [s for s in range(1, symbols + 1) for _ in range(n)]
        for t, target in enumerate(classes):
            if t == 0 or t > symbols * n:
                assert target == IGNORED
                continue
            counts = [text[:t].count(s) for s in range(1, symbols + 1)]
            if t == symbols * n:
                expected = 3
            elif counts[1] == 0:
                expected = 0
            else:
                expected = 1 if counts[1] < n else 2
            assert target == expected


def test_shuffle_2():
    tokens, targets = made("shuffle_2")
    for row, classes in zip(tokens.tolist(), targets.tolist(), strict=True):
        for t, target in enumerate(classes):
            depth = [row[: t + 1].count(1 + kind) - row[: t + 1].count(3 + kind) for kind in range(2)]
            assert min(depth) >= 0
            assert target == (depth[0] > 0) + 2 * (depth[1] > 0)


def test_reassigned_keys_have_their_latest_value_wherever_it_was_told():
    tokens, targets = made("reassigned", batch=64)
    stale = TASKS["reassigned"].stale(tokens, targets)
    layouts = set()
    for index, (row, classes) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
        told: dict[int, list[int]] = {}
        places = [t for t in range(0, len(row) - 6, 2) if row[t] < KEYS]
        for t in places:
            told.setdefault(row[t], []).append(row[t + 1] - KEYS)
        layouts.add(tuple(places))
        assert sorted(map(len, told.values())) == [1, 1, 1, 2, 2, 2]
        assert classes[-6:] == [told[key][-1] for key in row[-6:]]
        assert set(classes[:-6]) == {IGNORED}
        assert stale[index, -6:].tolist() == [told[key][0] if len(told[key]) == 2 else IGNORED for key in row[-6:]]
    assert len(layouts) > 60


@pytest.mark.parametrize("filler", ["noise", "text"])
@pytest.mark.parametrize("far", [False, True])
def test_recall_asks_for_what_was_told_before(filler, far):
    tokens, targets = Recall("r", "", filler).make(32, 96, torch.Generator().manual_seed(1), far=far)
    distances = []
    for row, classes in zip(tokens.tolist(), targets.tolist(), strict=True):
        asked = [t for t, target in enumerate(classes) if target != IGNORED]
        assert len(asked) == 4
        for t in asked:
            assert row[t - 1] == MARK
            told = [s for s in range(t - 1) if row[s] == row[t] and row[s - 1] != MARK]
            assert [row[s + 1] for s in told] == [classes[t]]
            distances.append(t - told[0])
    assert (min(distances), max(distances)) == ((89, 89) if far else (min(distances), max(distances)))
    assert far or (min(distances) < 10 and max(distances) > 60)


@pytest.mark.parametrize("facts", [4, 16, 64])
def test_mqar(facts):
    tokens, targets = MQAR(facts).make(8, torch.Generator().manual_seed(1))
    for row, classes in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = {row[t]: row[t + 1] for t in range(0, 2 * facts, 2)}
        assert len(told) == facts
        assert classes[2 * facts :] == [told[key] for key in row[2 * facts :]]
        assert len(classes) == 3 * facts + 48


def test_the_ramp_goes_on_once_most_answers_of_a_stage_are_right():
    progress = Progress()
    steps = 0
    while not progress.passes(1.0, 0.9):
        steps += 1
    assert 40 < steps < 60
    progress.next_stage(3)
    assert (progress.stage, progress.accuracy) == (1, 0.0)
    progress.stage = 2
    progress.next_stage(3)
    assert progress.stage == 2


def test_long_rows_are_read_piece_by_piece():
    task = Recall("r", "", "noise")
    model = task.build("delta_net", 0)
    tokens, _ = task.make(2, 1040, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(_answers(model, tokens), model(tokens).logits.argmax(-1))


def test_permutations():
    tokens, targets = made("s3", batch=4)
    swaps = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for row, classes in zip(tokens.tolist(), targets.tolist(), strict=True):
        state = (0, 1, 2)
        for token, target in zip(row, classes, strict=True):
            state = tuple(state[i] for i in swaps[token])
            assert swaps[target] == state


def test_longest_training_length_grows_in_the_first_half():
    assert [TASKS["s3"].longest(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [4, 14, 24, 24]
    assert TASKS["aa_star"].longest(0.0) == 40


@pytest.mark.parametrize(("name", "measure", "share"), [("parity", "tokens@40", 0.5), ("s3", "last@24", 1 / 6)])
def test_guessing_is_at_chance(name, measure, share):
    guessed = TASKS[name].references(256)["guessing"]
    assert guessed[measure] == pytest.approx(share, abs=0.08)


def test_a_model_that_knows_the_answer_scores_one_and_a_stale_one_is_seen():
    task = TASKS["reassigned"]

    class Answers:
        def __init__(self, answers):
            self.answers = answers

        def __call__(self, tokens):
            index = 40 if tokens.shape[1] == 40 else 80
            return type("Output", (), {"logits": torch.nn.functional.one_hot(self.answers[index], task.vocab)})

    truth, old = {}, {}
    for length in task.test_lengths:
        tokens, targets = task.make(8, length, torch.Generator().manual_seed(length))
        truth[length] = targets.clamp_min(0)
        stale = task.stale(tokens, targets)
        old[length] = torch.where(stale == IGNORED, truth[length], stale)
    right, wrong = task.measure(Answers(truth), 8), task.measure(Answers(old), 8)
    assert {right[f"{name}@80"] for name in ("tokens", "last", "strings")} == {1.0}
    assert right["stale@40"] == 0.0
    assert wrong["stale@40"] == 1.0
    assert wrong["tokens@40"] == 0.5
    assert wrong["strings@40"] == 0.0
