import math
import time

import numpy as np
import pytest

from nested_lm_lab.evaluation.floors import NgramFloors, discount_of

# Vocabulary 0..3, documents [1 2] and [1 1]; streams 0 1 2 0 and 0 1 1 0.
# Bigrams: (0,1) twice; (1,2), (2,0), (1,1), (1,0) once: n1 = 4, n2 = 1, discount 4/6 = 2/3.
# Token 1 follows 0 and 1; 2 follows 1; 0 follows 2 and 1; 3 follows nothing: 5 bigram types.
# Continuation counts 2, 2, 1, 0: n1 = 1, n2 = 2, discount 1/5; mass left 3/25, spread over 4 tokens.
DOCUMENTS = [np.array([1, 2]), np.array([1, 1])]
CONTINUATION = {
    0: (2 - 0.2) / 5 + 0.03,
    1: (2 - 0.2) / 5 + 0.03,
    2: (1 - 0.2) / 5 + 0.03,
    3: 0.03,
}


@pytest.fixture
def floors():
    return NgramFloors.count(DOCUMENTS, vocab_size=4)


def probability(floors, previous, following):
    return float(floors.bigram_probabilities(np.array([previous]), np.array([following]))[0])


def test_hand_worked_bigrams(floors):
    # Context 1 was seen 3 times with 3 different followers: mass left 2/3 * 3 / 3.
    assert probability(floors, 1, 2) == pytest.approx((1 - 2 / 3) / 3 + 2 / 3 * CONTINUATION[2], rel=1e-12)
    # Context 0 was seen twice, always before 1: mass left 2/3 * 1 / 2.
    assert probability(floors, 0, 1) == pytest.approx((2 - 2 / 3) / 2 + 1 / 3 * CONTINUATION[1], rel=1e-12)
    assert probability(floors, 0, 3) == pytest.approx(1 / 3 * CONTINUATION[3], rel=1e-12)
    # Context 3 was never seen: all mass goes to the lower order.
    assert probability(floors, 3, 2) == pytest.approx(CONTINUATION[2], rel=1e-12)


def test_hand_worked_document(floors):
    # Stream 0 2 0; unigram counts 0: 2, 1: 3, 2: 1, 3: 0 of 6, add-one over 10.
    assert floors.unigram_nats(np.array([2])) == pytest.approx(-math.log(2 / 10) - math.log(3 / 10), rel=1e-12)
    expected = -math.log(1 / 3 * CONTINUATION[2]) - math.log((1 - 2 / 3) / 1 + 2 / 3 * CONTINUATION[0])
    assert floors.bigram_nats(np.array([2])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [0, 1, 50, 3000])
def test_probabilities_of_every_context_sum_to_one(size):
    tokens = np.random.default_rng(size).zipf(1.3, size=size) % 40
    floors = NgramFloors.count([tokens], vocab_size=50)
    previous, following = np.mgrid[0:50, 0:50]
    probabilities = floors.bigram_probabilities(previous, following)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)


def test_no_documents_give_the_uniform_distribution():
    floors = NgramFloors.count([], vocab_size=8)
    assert floors.bigram_nats(np.array([3, 4])) == pytest.approx(3 * math.log(8), rel=1e-12)


def test_counting_in_parts_equals_counting_at_once(monkeypatch):
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 20, size=n) for n in (5, 90, 0, 33, 60)]
    whole = NgramFloors.count(documents, vocab_size=20)
    monkeypatch.setattr("nested_lm_lab.evaluation.floors._FLUSH_TOKENS", 40)
    parts = NgramFloors.count(documents, vocab_size=20)
    np.testing.assert_array_equal(parts.bigram_keys, whole.bigram_keys)
    np.testing.assert_array_equal(parts.bigram_counts, whole.bigram_counts)


@pytest.mark.parametrize(("counts", "expected"), [([1, 1, 2], 0.5), ([1, 5], 1.0), ([3, 2], 0.5), ([], 0.5)])
def test_discount(counts, expected):
    assert discount_of(np.array(counts, dtype=int)) == expected


def test_bigram_beats_unigram_on_text_with_order_and_is_fast():
    rng = np.random.default_rng(0)
    step = rng.integers(0, 3, size=400_000)
    chain = np.cumsum(step) % 2048
    floors = NgramFloors.count([chain], vocab_size=2048)
    started = time.perf_counter()
    held_out = np.cumsum(rng.integers(0, 3, size=20_000)) % 2048
    nats = floors.bigram_nats(held_out) / 20_001
    assert nats == pytest.approx(math.log(3), abs=0.05)
    assert floors.unigram_nats(held_out) / 20_001 > 6.5
    assert time.perf_counter() - started < 2


def test_other_boundary_tokens_are_counted_in_their_place():
    documents = [np.array([1, 2]), np.array([2, 2])]
    shifted = NgramFloors.count([tokens + 1 for tokens in documents], vocab_size=5, boundary=(0, 1))
    floors = NgramFloors.count(documents, vocab_size=4)
    assert shifted.unigram_counts.tolist() == [0, *floors.unigram_counts.tolist()]
    assert shifted.bigram_keys.tolist() == sorted([0 * 5 + 2, 2 * 5 + 3, 3 * 5 + 1, 0 * 5 + 3, 3 * 5 + 3])
