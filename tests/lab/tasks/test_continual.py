from pathlib import Path

import numpy as np
import pytest

from nested_lm.data.chronology import ReadingGroup
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError, NumericsError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.tasks.continual import chronological
from nested_lm_lab.tasks.continual import matrix as continual
from nested_lm_lab.tasks.continual.chronological import SegmentDocuments, segment_documents

# Rows: untrained, after segment 1, 2, 3. Columns: segments 1, 2, 3. Lower is better.
LOSSES = np.array(
    [
        [8.0, 8.0, 9.0],
        [4.0, 6.0, 7.0],
        [3.5, 3.0, 5.0],
        [5.0, 4.0, 2.0],
    ]
)


def test_forgetting_by_hand():
    expected = [
        [0.0, np.nan, np.nan],
        [0.0, 0.0, np.nan],  # segment 1 went on getting better while segment 2 was read
        [1.5, 1.0, 0.0],  # against its best, 3.5, not against 4.0
    ]
    np.testing.assert_array_equal(continual.forgetting(LOSSES), expected)


def test_a_best_before_the_segment_was_read_is_not_forgotten():
    losses = np.array([[5.0, 1.0], [4.0, 0.5], [4.0, 2.0]])  # column 2 was best before segment 2
    np.testing.assert_array_equal(continual.forgetting(losses), [[0.0, np.nan], [0.0, 0.0]])


def test_transfer_and_level_by_hand():
    assert continual.backward_transfer(LOSSES) == pytest.approx(-((5.0 - 4.0) + (4.0 - 3.0)) / 2)
    assert continual.forward_transfer(LOSSES) == pytest.approx(-((6.0 - 8.0) + (5.0 - 9.0)) / 2)
    assert continual.plasticity(LOSSES) == pytest.approx((4.0 + 3.0 + 2.0) / 3)
    assert continual.accuracy(LOSSES) == pytest.approx((5.0 + 4.0 + 2.0) / 3)


def test_signs_lower_is_better():
    helped = LOSSES.copy()
    helped[-1, :2] = 1.0
    assert continual.backward_transfer(helped) > 0
    hindered = LOSSES.copy()
    hindered[1, 1], hindered[2, 2] = 9.0, 10.0
    assert continual.forward_transfer(hindered) < 0


def test_metrics_work_on_a_stack_of_resamples():
    stack = np.stack([LOSSES, LOSSES + 1, 2 * LOSSES])
    for metric in (
        continual.forgetting,
        continual.backward_transfer,
        continual.forward_transfer,
        continual.plasticity,
        continual.accuracy,
    ):
        np.testing.assert_array_equal(metric(stack)[2], metric(stack[2]))


def summary(nats, *, documents=4):
    """Every document of a segment has 100 bytes and 50 tokens."""
    segments = [
        SegmentDocuments(ReadingGroup(f"period {s}", (s,)), ([],), np.full(documents, 100.0), 10 * documents)
        for s in range(nats[0].shape[0])
    ]
    return chronological.summarise(
        [list(row) for row in nats],
        [np.full(documents, 50)] * len(segments),
        segments,
        trained_tokens=[1000 * (s + 1) for s in range(len(segments))],
        bootstrap=Bootstrap(samples=200),
    )


def test_summary_reports_bits_per_byte_and_nats_per_token():
    noise = np.array([0.9, 1.0, 1.0, 1.1])
    nats = [row[:, None] * 100 * np.log(2) * noise for row in LOSSES]  # bits per byte equal LOSSES
    metrics = summary(nats)
    values = [[cell.value for cell in row] for row in metrics.bits_per_byte]
    np.testing.assert_allclose(values, LOSSES, rtol=1e-12)
    assert metrics.nats_per_token[1][0].value == pytest.approx(4.0 * 2 * np.log(2))
    assert metrics.forgetting[2][0].value == pytest.approx(1.5)
    assert metrics.forgetting[0][1] is None
    assert metrics.backward_transfer.value == pytest.approx(-1.0)
    assert metrics.backward_transfer.low < -1.0 < metrics.backward_transfer.high
    assert metrics.backward_transfer.n == 12
    assert metrics.segments[1].trained_tokens == 2000
    # All checkpoints are resampled on the same documents, so noise they share leaves the differences alone.
    width = metrics.backward_transfer.high - metrics.backward_transfer.low
    assert width < metrics.accuracy.high - metrics.accuracy.low


def test_mean_forgetting_has_the_interval_that_resampling_all_segments_gives():
    """From the stored cells alone, against the draws themselves."""
    rng = np.random.default_rng(0)
    documents, drawn = 30, []
    noise = rng.normal(0.0, 0.3, size=(4, 3, documents))
    nats = [(row[:, None] + noise[t]) * 100 * np.log(2) for t, row in enumerate(LOSSES)]
    metrics = summary(nats, documents=documents)
    found = chronological.mean_forgetting(metrics)
    assert found.value == pytest.approx(np.mean([cell.value for cell in metrics.forgetting[-1][:-1]]))
    assert found.n == 2 * documents
    for s in range(3):
        chosen = np.random.default_rng(s).integers(documents, size=(4000, documents))
        drawn.append(np.stack([LOSSES[t, s] + noise[t, s][chosen].mean(axis=1) for t in range(4)], axis=1))
    lost = continual.forgetting(np.stack(drawn, axis=2))[:, -1, :-1].mean(axis=1)
    # A percentile of 200 draws in the one, of 4000 in the other: a fifth of the distance is their noise.
    below, above = found.value - found.low, found.high - found.value
    assert below == pytest.approx(found.value - np.percentile(lost, 2.5), rel=0.2)
    assert above == pytest.approx(np.percentile(lost, 97.5) - found.value, rel=0.2)


def test_mean_forgetting_of_single_documents_has_no_interval():
    found = chronological.mean_forgetting(summary([row[:, None] * 100 for row in LOSSES], documents=1))
    assert (found.low, found.high, found.n) == (None, None, 2)


def test_a_loss_that_is_not_finite_is_refused():
    nats = [np.full((2, 4), 5.0) for _ in range(3)]
    nats[1][0, 2] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        summary(nats)


def groups(*periods):
    return [ReadingGroup("1825-1874" if 1 in chosen else "start", chosen) for chosen in periods]


def test_segments_hold_the_dated_held_out_documents(data_config):
    splits = [TokenDataset.open(Path(data_config.output_dir), name) for name in ("validation", "test")]
    segments = segment_documents(splits, groups((0, 1), (2, 3)), seed=0, context_length=16, max_pieces=None)
    for segment in segments:
        rows = [
            split.documents[index] for split, chosen in zip(splits, segment.indices, strict=True) for index in chosen
        ]
        assert {row.period for row in rows} <= set(segment.group.periods)
        assert segment.bytes.tolist() == [row.bytes for row in rows]
    assert sum(len(segment.bytes) for segment in segments) == sum(len(split.documents) for split in splits)


def test_a_segment_without_held_out_documents_is_refused(data_config):
    splits = [TokenDataset.open(Path(data_config.output_dir), "test")]
    splits[0].documents = [row for row in splits[0].documents if row.period == 0]
    with pytest.raises(DataError, match=r"no validation or test document is dated in 1825-1874"):
        segment_documents(splits, groups((0,), (1, 2)), seed=0, context_length=16, max_pieces=None)


class TestRegret:
    ORACLE = np.array([3.0, 3.0, 1.0])

    def test_by_hand(self):
        found = continual.regret(LOSSES, self.ORACLE)
        assert found.on == pytest.approx((1.0 + 0.0 + 1.0) / 3)
        assert found.below == pytest.approx((0.5 + 2.0 + 1.0) / 3)  # segments read before
        assert found.above == pytest.approx((3.0 + 6.0 + 4.0) / 3)  # not yet read; the untrained row does not count

    def test_every_resample_has_its_own_oracle(self):
        stack, oracles = np.stack([LOSSES, LOSSES + 1]), np.stack([self.ORACLE, self.ORACLE + 1])
        np.testing.assert_allclose(
            np.stack(continual.regret(stack, oracles))[:, 1], continual.regret(LOSSES, self.ORACLE)
        )


# Accuracies, higher is better; above the diagonal nothing is defined.
SCORES = np.array(
    [
        [0.9, np.nan, np.nan, np.nan],
        [0.6, 0.8, np.nan, np.nan],
        [0.7, 0.9, 1.0, np.nan],
        [0.5, 1.0, 0.4, 0.6],
    ]
)


def test_scores_by_hand():
    assert continual.final_score(SCORES) == pytest.approx((0.5 + 1.0 + 0.4 + 0.6) / 4)
    assert continual.incremental_score(SCORES) == pytest.approx((0.9 + 0.7 + 2.6 / 3 + 2.5 / 4) / 4)
    assert continual.score_backward_transfer(SCORES) == pytest.approx((-0.4 + 0.2 - 0.6) / 3)
    assert continual.score_plasticity(SCORES) == pytest.approx((0.9 + 0.8 + 1.0 + 0.6) / 4)
    # The peak of task 2 lies between its own row and the last but one; it got better still, which counts below zero.
    assert continual.score_forgetting(SCORES) == pytest.approx((0.4 + (0.9 - 1.0) + 0.6) / 3)


def test_a_peak_before_the_task_is_not_forgotten():
    scores = np.array([[0.5, 1.0], [0.5, 0.2]])  # task 2 was right by luck before it was learned
    assert continual.score_forgetting(scores) == 0.0


def test_scores_work_on_a_stack_of_resamples():
    stack = np.stack([SCORES, 0.5 * SCORES])
    for metric in (
        continual.final_score,
        continual.incremental_score,
        continual.score_backward_transfer,
        continual.score_forgetting,
        continual.score_plasticity,
    ):
        np.testing.assert_allclose(metric(stack), [metric(SCORES), 0.5 * metric(SCORES)])
