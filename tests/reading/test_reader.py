"""The one reader: trees, batches, branches and forks give the numbers of one sequence at a time."""

import numpy as np
import pytest
import torch

from nested_lm.errors import NumericsError
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading import calls
from nested_lm.reading.calls import OutOfRoomError, look_up, memory_watch, read, segment_room
from nested_lm.reading.reader import OwnStates, Reader, Scored, _alone, _Reading, grow
from tests.reading.models import PARTS, alone, assert_scores, build, document, overflowing, tokens, trees

PROMISED = 1e-6  # float32 sums of a few tokens, in nats


@pytest.fixture(scope="module")
def documents():
    return trees()


def sizes_of_calls(model, work):
    """Rows and numbers of tokens of every call of a model."""
    seen = []
    hook = model.embedding.register_forward_pre_hook(
        lambda _, given: seen.append((given[0].shape[0], given[0].numel()))
    )
    work()
    hook.remove()
    return seen


def tree(entry):
    return grow([_Reading(0, scored) for scored in entry])


@pytest.mark.parametrize("name", PARTS)
def test_forked_batches_are_single_sequences(name, documents):
    model = build(name)
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    assert_scores(Reader(model, rows=4).score(documents), expected)
    assert_scores(Reader(model, rows=1).score(documents), expected)
    assert_scores(Reader(model, rows=3, shared=False).score(documents), expected)


def test_forked_is_unforked_in_float32(documents):
    model = build("hope", torch.float32)
    forked = Reader(model, rows=4).score(documents)
    unforked = Reader(model, rows=1, shared=False).score(documents)
    for row, wanted in zip(forked, unforked, strict=True):
        for a, b in zip(row, wanted, strict=True):
            assert a.total == pytest.approx(b.total, rel=PROMISED)


def test_one_call_or_forks(documents):
    model = build("hope")
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    reader = Reader(model, rows=4)
    assert model.reads_branches
    for call_tokens in (4096, 40, 1):  # all fit in a call, some, none
        reader.call_tokens = call_tokens
        sizes = sizes_of_calls(model, lambda: assert_scores(reader.score(documents), expected))
        assert all(size <= call_tokens or rows == 1 for rows, size in sizes)
    assert len(sizes) > len(documents)


def test_rows_are_padded_by_less_than_a_call_costs():
    rng = np.random.default_rng(0)
    documents = [document(rng, 12, tail, tail + 1, tail + 2) for tail in range(2, 40)]
    reader = Reader(build("hope"), rows=32)
    sizes = sizes_of_calls(reader.model, lambda: reader.score(documents))
    assert sum(size for _, size in sizes) <= reader.planned_tokens(documents) + 48 * len(sizes)
    assert len(sizes) < len(documents)


def test_sequences_that_begin_one_another_are_one_text():
    one, other = Scored(np.array([0, 5, 6, 7]), 2), Scored(np.array([0, 5, 6, 7, 8, 9]), 2)
    found = tree((one, other))
    assert found.tails == ()
    assert found.stem.tolist() == [0, 5, 6, 7, 8]


def test_long_stems_of_several_documents_do_not_meet():
    rng = np.random.default_rng(0)
    model = build("hope")
    documents = [document(rng, 600, *tails) for tails in ((3,), (3,), (2, 4), (2, 4))]
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    assert_scores(Reader(model, rows=2).score(documents), expected)


def test_a_score_that_is_not_finite_is_traced_to_its_branch():
    model = build("hope")
    model.embedding.register_forward_hook(lambda _, given, x: x.masked_fill((given[0] == 60)[..., None], torch.nan))
    fine, bad = (Scored(np.array([0, 5, 6, *end, 8, 9]), 3) for end in ([9], [60]))
    other = Scored(np.array([0, 5, 6, 7, 8, 9]), 3)
    with pytest.raises(NumericsError, match=r"token 3"):
        Reader(model, rows=4).score([(other, fine), (other, bad, fine)])


def test_a_branch_alone_is_its_stem_and_itself():
    row = torch.tensor([0, 5, 6, 7, 8, 60, 8, 0])
    cuts = torch.tensor([3, 5, 5, 7])
    found = [_alone(row, cuts, column).tolist() for column in (1, 4, 5)]
    assert found == [[0, 5, 6], [0, 5, 6, 7, 8], [0, 5, 6, 60, 8]]


@pytest.mark.parametrize("first", ["A", "B"])
def test_batches_of_documents_that_are_alike_do_not_depend_on_their_order(first):
    a = tuple(Scored(np.array([0, 1, *end, 2]), 2) for end in ([9, 3], [4]))
    b = tuple(Scored(np.array([0, 1, *end, 2]), 2) for end in ([9], [3, 4]))
    documents = [a, b] if first == "A" else [b, a]
    reader = Reader(build("hope"), rows=1)
    batches = reader._batches([tree(entry) for entry in documents], None)
    found = [[tail.tokens.tolist() for tail in batch[0].tails] for batch in batches]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", ["hope", "hope_in_context", "transformer"])
def test_order_of_documents_changes_no_bit(name, documents):
    model = build(name, torch.float32)
    reader = Reader(model, rows=3)
    straight = reader.score(documents)
    order = np.random.default_rng(0).permutation(len(documents))
    shuffled = reader.score([documents[index] for index in order])
    assert_scores([shuffled[place] for place in np.argsort(order)], straight, 0.0)


def test_nothing_is_read_twice(documents):
    reported, given = [], []
    reader = Reader(build("hope"), rows=4, on_tokens=reported.append)
    reader.model.embedding.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].numel()))
    reader.score(documents)
    assert all(tail.tokens.size for entry in documents for tail in tree(entry).tails)
    assert sum(reported) == reader.planned_tokens(documents)
    padding = sum(given) - sum(reported)
    assert 0 < padding < 0.3 * sum(given)
    everything = Reader(reader.model, rows=4, shared=False).planned_tokens(documents)
    assert everything == sum(len(sequence.tokens) - 1 for entry in documents for sequence in entry)
    assert everything > 1.4 * reader.planned_tokens(documents)


def test_a_passage_of_several_questions_is_read_once(documents):
    reader = Reader(build("hope"), rows=4)
    questions = documents[:3]
    # The start and the passage, then each question; of two answers that begin alike the common token once.
    assert [reader.planned_tokens([entry]) for entry in questions] == [28, 29, 27]
    assert reader.planned_tokens(questions) == 25 + 3 + 4 + 2
    assert reader.planned_tokens(questions[::-1]) == reader.planned_tokens(questions)


def test_long_stems_are_read_in_segments():
    rng = np.random.default_rng(1)
    model = build("hope", width=8, num_layers=1)
    entry = document(rng, 1030, 2, 3)
    calls = []
    reader = Reader(model, rows=2, on_tokens=calls.append)
    assert_scores(reader.score([entry]), [[alone(model, sequence) for sequence in entry]], 1e-8)
    assert calls[:2] == [512, 512]


def test_scores_that_are_not_finite_name_the_place(documents):
    with pytest.raises(NumericsError, match=r"not finite after 0 tokens.*first seen in layer 1, .*token"):
        Reader(overflowing("hope", layer=1), rows=4).score(documents)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("shared", [True, False])
def test_from_one_state_and_from_a_state_for_each(name, shared, documents):
    model = build(name)
    with torch.no_grad():
        states = model(tokens(len(documents), 9)).state
    one = states.select(torch.tensor([3]))
    kept = [tensor.clone() for tensor in iterate_tensors((states.layers, states.in_context))]
    reader = Reader(model, rows=4, shared=shared)
    assert_scores(
        reader.score(documents, starts=one), [[alone(model, each, one) for each in entry] for entry in documents], 1e-8
    )
    expected = [
        [alone(model, each, states.select(torch.tensor([row]))) for each in entry]
        for row, entry in enumerate(documents)
    ]
    assert_scores(reader.score(documents, starts=OwnStates(states)), expected, 1e-8)
    assert all(map(torch.equal, kept, iterate_tensors((states.layers, states.in_context))))


@pytest.mark.parametrize("name", ["hope", "hope_in_context", "titans_mac", "transformer"])
def test_long_stems_tails_and_rows_of_unequal_length_in_segments(name, monkeypatch):
    monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
    model, rng = build(name), np.random.default_rng(0)
    documents = [document(rng, 40, 50, 70), document(rng, 5, 60), document(rng, 3, 37), document(rng, 3, 33)]
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    sizes = sizes_of_calls(model, lambda: assert_scores(Reader(model, rows=3).score(documents), expected, 1e-8))
    assert model.reads_branches or all(size <= 2 * 16 * rows for rows, size in sizes)
    assert max(rows for rows, _ in sizes) == 3


def test_ties_count_against_the_model():
    scores = look_up(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0, 1]))
    assert scores.ranks.tolist() == [2, 1, 2]
    assert not scores.greedy
    assert scores.nats[0] == pytest.approx(np.log(2))


def test_a_read_of_targets_is_the_scores_of_a_sequence(documents):
    model = build("hope")
    text = documents[0][2].tokens[None]
    found = read(model, text[:, :-1], targets=text[:, 1:])
    np.testing.assert_allclose(found.nats[0], alone(model, Scored(text[0])).nats, rtol=0, atol=1e-10)
    assert found.state.position == text.shape[1] - 1
    torch.testing.assert_close(found.logits, read(model, text[:, :-1]).logits, rtol=0, atol=1e-12)


def test_segments_are_multiples_of_the_models_alignment(monkeypatch):
    monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
    for alignment, length in ((4, 16), (5, 20), (24, 24)):
        model = type("Model", (), {"config": type("Config", (), {"alignment": alignment})})
        assert [segment_room(model, position) for position in (0, 1, length)] == [length, length - 1, length]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("not enough memory: you tried to allocate 17179869184 bytes."),
    ],
)
def test_every_end_of_memory_is_known_as_one(error):
    with pytest.raises(OutOfRoomError, match="memory ended"), memory_watch():
        raise error


def test_other_errors_are_not_taken_for_the_end_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_watch():
        raise RuntimeError("shapes do not match")
