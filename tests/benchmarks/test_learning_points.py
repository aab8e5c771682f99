"""Tasks over points: streams against brute force, references by hand, and what the model sees."""

import numpy as np
import pytest
import torch
from benchmarks.learning.continuous import POINT_TASKS, nearest_mean
from benchmarks.learning.protocol import IGNORED

REGRESSION, INCREMENTS = POINT_TASKS


def drawn(task, batch=6):
    return task.make(batch, torch.Generator().manual_seed(5))


def test_regression_asks_for_every_point_before_it_tells_it():
    facts, x, y = drawn(REGRESSION)
    assert facts.points.shape == (6, 48, 8)
    for n in range(24):
        assert torch.equal(facts.points[:, 2 * n], x[:, n])
        assert torch.equal(facts.points[:, 2 * n + 1], x[:, n])
        assert torch.equal(facts.answers[:, 2 * n], torch.zeros(6, 1))
        assert torch.equal(facts.answers[:, 2 * n + 1, 0], y[:, n])
    assert facts.asks[0].tolist() == [1.0, 0.0] * 24
    w = torch.linalg.lstsq(x[:, :8], y[:, :8, None]).solution
    torch.testing.assert_close((x @ w)[..., 0], y, rtol=1e-2, atol=1e-2)  # one w a row, without noise


def test_least_squares_errs_by_the_share_of_unseen_dimensions():
    found = REGRESSION.references(256)
    assert found["answering 0"]["error@24"] == pytest.approx(1.0, abs=0.15)
    assert found["least squares"]["error@4"] == pytest.approx(1 - 3 / 8, abs=0.1)
    assert found["least squares"]["error@12"] < 1e-6


def test_classes_come_in_groups_and_only_seen_ones_are_asked_for():
    stream = drawn(INCREMENTS)
    for row in range(6):
        seen, groups, at = [], {}, 0
        for group in range(5):
            told = stream.facts.answers[row, at : at + 8]
            assert told.sum(1).tolist() == [1.0] * 8
            labels = told.argmax(1).tolist()
            assert sorted(labels.count(label) for label in set(labels)) == [4, 4]
            assert not set(labels) & set(seen)
            seen += sorted(set(labels))
            groups |= dict.fromkeys(labels, group)
            asked = slice(at + 8, at + 8 + 2 * (group + 1))
            assert sorted(stream.targets[row, asked].tolist()) == sorted(seen)
            assert stream.facts.answers[row, asked].sum() == 0
            assert [groups[label] for label in stream.targets[row, asked].tolist()] == stream.group[row, asked].tolist()
            assert set(stream.targets[row, at : at + 8].tolist()) == {IGNORED}
            assert stream.facts.asks[row, at : asked.stop].tolist() == [0.0] * 8 + [1.0] * 2 * (group + 1)
            at = asked.stop
        assert at == stream.targets.shape[1]
        assert sorted(seen) == list(range(10))


def test_nearest_mean_by_brute_force():
    facts = drawn(INCREMENTS, 2).facts
    found = nearest_mean(facts)
    for row in range(2):
        told = {}
        for t in range(facts.points.shape[1]):
            if facts.asks[row, t] == 0:
                told.setdefault(int(facts.answers[row, t].argmax()), []).append(facts.points[row, t])
            distances = {c: (facts.points[row, t] - torch.stack(p).mean(0)).norm() for c, p in told.items()}
            assert found[row, t] == min(distances, key=distances.get)


def test_matrix_and_scores_of_a_learner_that_keeps_the_last_group_only():
    stream = drawn(INCREMENTS, 32)
    latest = torch.zeros_like(stream.targets)
    at = 0
    for group in range(5):
        end = at + 8 + 2 * (group + 1)
        latest[:, at:end] = group
        at = end
    answers = torch.where(stream.group == latest, stream.targets, -1)
    assert np.array_equal(INCREMENTS.matrix(stream, answers), np.eye(5))
    assert INCREMENTS.scores(stream, answers) == {
        "accuracy": 0.2, "when new": 1.0, "forgetting": 1.0, "backward transfer": -1.0
    }  # fmt: skip


@pytest.mark.parametrize("task", POINT_TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("arm", ["hope", "transformer", "titans_lmm"])
def test_the_model_answers_from_the_past_and_from_its_writes(task, arm):
    model = task.build(arm, 0)
    drawn_facts = drawn(task, 2)
    facts = drawn_facts[0] if task is REGRESSION else drawn_facts.facts
    changed = facts._replace(points=facts.points.clone())
    changed.points[:, 20:] += 1.0
    with torch.no_grad():
        before, after = model(facts), model(changed)
        unwritten = model(facts, writes=False)
    assert before.shape == (2, facts.points.shape[1], task.answer_width)
    torch.testing.assert_close(after[:, :16], before[:, :16])
    assert not torch.equal(after[:, 20:], before[:, 20:])
    assert torch.equal(unwritten, before) == (arm == "transformer")


def test_regression_loss_is_that_of_the_questions():
    model = REGRESSION.build("transformer", 0)
    loss = REGRESSION.loss(model, torch.Generator().manual_seed(1), 0.0)
    facts, _, y = REGRESSION.make(64, torch.Generator().manual_seed(1))
    expected = sum(((model(facts)[:, 2 * n, 0] - y[:, n]) ** 2).mean() for n in range(24)) / 24
    torch.testing.assert_close(loss, expected)
