"""Shared contexts, batches and memorised texts: the same numbers as one sequence at a time."""

import numpy as np
import pytest
import torch

from nested_lm.errors import ConfigError, NumericsError
from nested_lm.nn.state import iterate_tensors
from nested_lm_lab.tasks.zeroshot.memorize import MemorizedStarts, check_memorize, level_names, shared_text
from nested_lm_lab.tasks.zeroshot.sequences import Likelihood, ModelScorer, Scored, split
from nested_lm_lab.tasks.zeroshot.sequences import _alone as alone_in_row
from nested_lm_lab.tasks.zeroshot.settings import Memorize, parse_memorize
from tests.reading.models import PARTS, build, overflowing, tokens

TOLERANCE = 1e-10  # float64; forks and batches change rounding only
PROMISED = 1e-6  # float32 sums of a few tokens, in nats
BOUNDARY = (0, 0)


def document(rng, context, *ends, start=0):
    text = rng.integers(1, 61, context)
    return tuple(Scored(np.concatenate([[start], text, rng.integers(1, 61, end)]), 1 + context) for end in ends)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(4)
    sizes = [(5, 1, 1), (5, 1, 2, 7), (9, 3), (30, 4, 12), (5, 2, 2), (21, 1), (17, 6, 5, 4, 3)]
    made = [document(rng, *size) for size in sizes]
    # The sequences part before the scored tokens, as in WinoGrande, or only some tokens after their first.
    a, b = made[0]
    made.append((a, Scored(np.concatenate([a.tokens[:3], b.tokens[4:], [7, 8]]), b.first)))
    made.append((Scored(np.array([0, 5, 6, 7, 8]), 2), Scored(np.array([0, 5, 6, 7, 9, 9]), 2)))
    # Questions about one passage, answered by one token or two that begin alike.
    passage = rng.integers(1, 61, 24)
    questions = []
    for question in ([3, 4], [3, 9, 9], [5]):
        text = np.concatenate([[0], passage, question])
        ends = ([7], [8, 1], [8, 2])
        questions.append(tuple(Scored(np.concatenate([text, end]), len(text)) for end in ends))
    return questions + made


@torch.no_grad()
def alone(model, sequence):
    logits = model(torch.from_numpy(sequence.tokens[None, :-1])).logits[0].log_softmax(dim=-1)
    positions = range(sequence.first - 1, len(sequence.tokens) - 1)
    return Likelihood(
        -sum(float(logits[position, sequence.tokens[position + 1]]) for position in positions),
        all(int(logits[position].argmax()) == sequence.tokens[position + 1] for position in positions),
    )


def calls_of(model, work):
    """Rows and numbers of tokens of every call of a model."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape[0], given[0].numel())))
    work()
    hook.remove()
    return seen


def assert_equal(found, expected, tolerance=TOLERANCE):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for a, b in zip(row, wanted, strict=True):
            assert a.nats == pytest.approx(b.nats, abs=tolerance)
            assert a.greedy == b.greedy


@pytest.mark.parametrize("name", PARTS)
def test_forked_batches_are_single_sequences(name, documents):
    model = build(name)
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    assert_equal(ModelScorer(model, batch_rows=4).score(documents), expected)
    assert_equal(ModelScorer(model, batch_rows=1).score(documents), expected)
    assert_equal(ModelScorer(model, batch_rows=3, shared=False).score(documents), expected)


def test_forked_is_unforked_in_float32(documents):
    model = build("hope", torch.float32)
    forked = ModelScorer(model, batch_rows=4).score(documents)
    unforked = ModelScorer(model, batch_rows=1, shared=False).score(documents)
    for row, wanted in zip(forked, unforked, strict=True):
        for a, b in zip(row, wanted, strict=True):
            assert a.nats == pytest.approx(b.nats, rel=PROMISED)


def test_one_call_or_forks(documents):
    model = build("hope")
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    scorer = ModelScorer(model, batch_rows=4)
    assert model.reads_branches
    for call_tokens in (4096, 40, 1):  # all fit in a call, some, none
        scorer.call_tokens = call_tokens
        sizes = calls_of(model, lambda: assert_equal(scorer.score(documents), expected))
        assert all(size <= call_tokens or rows == 1 for rows, size in sizes)
    assert len(sizes) > len(documents)


def test_rows_are_padded_by_less_than_a_call_costs():
    rng = np.random.default_rng(0)
    documents = [document(rng, 12, tail, tail + 1, tail + 2) for tail in range(2, 40)]
    scorer = ModelScorer(build("hope"), batch_rows=32)
    sizes = calls_of(scorer.model, lambda: scorer.score(documents))
    assert sum(size for _, size in sizes) <= scorer.planned_tokens(documents) + 48 * len(sizes)
    assert len(sizes) < len(documents)


def test_sequences_that_begin_one_another_are_one_text():
    one, other = Scored(np.array([0, 5, 6, 7]), 2), Scored(np.array([0, 5, 6, 7, 8, 9]), 2)
    found = split(3, (one, other))
    assert found.tails == ()
    assert found.stem.tolist() == [0, 5, 6, 7, 8]


def test_long_stems_of_several_documents_do_not_meet():
    rng = np.random.default_rng(0)
    model = build("hope")
    documents = [document(rng, 600, *tails) for tails in ((3,), (3,), (2, 4), (2, 4))]
    expected = [[alone(model, sequence) for sequence in entry] for entry in documents]
    assert_equal(ModelScorer(model, batch_rows=2).score(documents), expected)


def test_a_score_that_is_not_finite_is_traced_to_its_branch():
    model = build("hope")
    model.embedding.register_forward_hook(lambda _, given, x: x.masked_fill((given[0] == 60)[..., None], torch.nan))
    fine, bad = (Scored(np.array([0, 5, 6, *end, 8, 9]), 3) for end in ([9], [60]))
    other = Scored(np.array([0, 5, 6, 7, 8, 9]), 3)
    with pytest.raises(NumericsError, match=r"token 3"):
        ModelScorer(model, batch_rows=4).score([(other, fine), (other, bad, fine)])


def test_a_branch_alone_is_its_stem_and_itself():
    row = torch.tensor([0, 5, 6, 7, 8, 60, 8, 0])
    cuts = torch.tensor([3, 5, 5, 7])
    found = [alone_in_row(row, cuts, column).tolist() for column in (1, 4, 5)]
    assert found == [[0, 5, 6], [0, 5, 6, 7, 8], [0, 5, 6, 60, 8]]


@pytest.mark.parametrize("first", ["A", "B"])
def test_batches_of_documents_that_are_alike_do_not_depend_on_their_order(first):
    a = tuple(Scored(np.array([0, 1, *end, 2]), 2) for end in ([9, 3], [4]))
    b = tuple(Scored(np.array([0, 1, *end, 2]), 2) for end in ([9], [3, 4]))
    documents = [a, b] if first == "A" else [b, a]
    scorer = ModelScorer(build("hope"), batch_rows=1)
    batches = scorer._batches([split(number, entry) for number, entry in enumerate(documents)], [])
    found = [[tail.tokens.tolist() for tail in batch[0].tails] for batch in batches]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", ["hope", "hope_in_context", "transformer"])
def test_order_of_documents_changes_no_bit(name, documents):
    model = build(name, torch.float32)
    scorer = ModelScorer(model, batch_rows=3)
    straight = scorer.score(documents)
    order = np.random.default_rng(0).permutation(len(documents))
    shuffled = scorer.score([documents[index] for index in order])
    assert [shuffled[place] for place in np.argsort(order)] == straight


def test_nothing_is_read_twice(documents):
    reported, given = [], []
    scorer = ModelScorer(build("hope"), batch_rows=4, on_tokens=reported.append)
    scorer.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].numel()))
    scorer.score(documents)
    assert all(tail.tokens.size for entry in documents for tail in split(0, entry).tails)
    assert sum(reported) == scorer.planned_tokens(documents)
    padding = sum(given) - sum(reported)
    assert 0 < padding < 0.3 * sum(given)
    everything = ModelScorer(scorer.model, batch_rows=4, shared=False).planned_tokens(documents)
    assert everything == sum(len(sequence.tokens) - 1 for entry in documents for sequence in entry)
    assert everything > 1.4 * scorer.planned_tokens(documents)


def test_a_passage_of_several_questions_is_read_once(documents):
    scorer = ModelScorer(build("hope"), batch_rows=4)
    questions = documents[:3]
    # The start and the passage, then each question; of two answers that begin alike the common token once.
    assert [scorer.planned_tokens([entry]) for entry in questions] == [28, 29, 27]
    assert scorer.planned_tokens(questions) == 25 + 3 + 4 + 2
    assert scorer.planned_tokens(questions[::-1]) == scorer.planned_tokens(questions)


def test_long_stems_are_read_in_segments():
    rng = np.random.default_rng(1)
    model = build("hope", width=8, num_layers=1)
    entry = document(rng, 1030, 2, 3)
    calls = []
    scorer = ModelScorer(model, batch_rows=2, on_tokens=calls.append)
    assert_equal(scorer.score([entry]), [[alone(model, sequence) for sequence in entry]], 1e-8)
    assert calls[:2] == [512, 512]


def test_scores_that_are_not_finite_name_the_place(documents):
    with pytest.raises(NumericsError, match=r"not finite; first seen in .*layer"):
        ModelScorer(overflowing("hope", layer=1), batch_rows=4).score(documents)


class TestMemorize:
    @pytest.mark.parametrize("name", ["hope", "hope_in_context", "titans_mag", "titans_mac", "delta_net"])
    @pytest.mark.parametrize("passes", [1, 2])
    def test_is_the_text_read_before_the_document(self, name, passes, documents):
        model = build(name)
        starts = MemorizedStarts(model, documents, Memorize(passes=passes), BOUNDARY)
        found = ModelScorer(model, batch_rows=4, starts=starts).score(documents)
        alignment = model.config.alignment
        for index, entry in enumerate(documents):
            text = np.concatenate([[0], shared_text(entry)])
            padded = np.concatenate([text, np.zeros(-len(text) % alignment, dtype=np.int64)])
            read = np.concatenate([padded] * passes)
            assert starts.length(index) == len(read)
            for got, sequence in zip(found[index], entry, strict=True):
                whole = Scored(np.concatenate([read, sequence.tokens]), len(read) + sequence.first)
                assert got.nats == pytest.approx(alone(model, whole).nats, abs=1e-8)

    def test_never_reads_an_answer(self, documents):
        for entry in documents:
            text = shared_text(entry)
            for sequence in entry:
                assert len(text) <= sequence.first - 1
                assert (sequence.tokens[1 : 1 + len(text)] == text).all()
        assert len(shared_text(documents[-2])) == 2  # the choices part inside the context

    @pytest.mark.parametrize("name", ["hope", "delta_net", "titans_mal"])
    def test_a_threshold_above_every_loss_writes_nothing(self, name, documents):
        model = build(name)
        never = MemorizedStarts(model, documents, Memorize(surprise=1e6), BOUNDARY).states([3])
        always = MemorizedStarts(model, documents, Memorize(surprise=0.0), BOUNDARY).states([3])
        plain = MemorizedStarts(model, documents, Memorize(), BOUNDARY).states([3])
        fresh = model.initial_state(1)

        def weights(state):
            layer = state.layers[-1]
            memory = getattr(layer, "memory", layer)
            memory = getattr(memory, "memory", memory)
            return iterate_tensors(memory.current) if hasattr(memory, "current") else [memory.matrix]

        for a, b, c, _ in zip(*map(weights, (never, fresh, always, plain)), strict=True):
            assert torch.equal(a, b)
            assert not torch.allclose(c, b)
        # A segment that holds nothing but the padding is never written, so `always` may differ from `plain` there.
        assert never.position == always.position == plain.position

    def test_rows_of_one_batch_cross_the_threshold_apart(self):
        model = build("hope")
        rng = np.random.default_rng(2)
        entries = [document(rng, 14, 1), document(rng, 14, 1)]
        losses = [alone(model, Scored(entry[0].tokens[:5], 1)).nats / 4 for entry in entries]
        between = Memorize(surprise=sum(losses) / 2)
        both = MemorizedStarts(model, entries, between, BOUNDARY)
        batched = ModelScorer(model, batch_rows=2, starts=both).score(entries)
        for index, entry in enumerate(entries):
            single = MemorizedStarts(model, [entry], between, BOUNDARY)
            assert_equal(ModelScorer(model, batch_rows=1, starts=single).score([entry]), [batched[index]])

    def test_chosen_memories_keep_what_they_wrote(self, documents):
        model = build("hope")
        names = level_names(model)
        assert names == ("k", "eta", "alpha", "v", "memory")
        fresh = model.initial_state(1).layers[0].memory.current
        kept = MemorizedStarts(model, documents, Memorize(levels=("v", "memory")), BOUNDARY).states([3])
        whole = MemorizedStarts(model, documents, Memorize(), BOUNDARY).states([3]).layers[0].memory.current
        for found, start, after in zip(kept.layers[0].memory.current, fresh, whole, strict=True):
            for index, name in enumerate(names):
                source = after if name in ("v", "memory") else start
                assert torch.equal(found[:, :, index], source[:, :, index])
        everything = MemorizedStarts(model, documents, Memorize(levels=names), BOUNDARY)
        assert_equal(
            ModelScorer(model, batch_rows=4, starts=everything).score(documents),
            ModelScorer(model, batch_rows=4, starts=MemorizedStarts(model, documents, Memorize(), BOUNDARY)).score(
                documents
            ),
        )

    def test_chosen_levels_of_the_channels(self, documents):
        model = build("hope_in_context")
        assert level_names(model)[-2:] == ("level0", "level1")
        kept = MemorizedStarts(model, documents, Memorize(levels=("level1",)), BOUNDARY).states([6])
        fast, slow = kept.in_context.levels
        assert all(not tensor.any() for tensor in iterate_tensors(fast.distance))
        assert any(tensor.any() for tensor in iterate_tensors(slow.distance))
        fresh = model.initial_state(1)
        for found, start in zip(kept.layers, fresh.layers, strict=True):
            assert torch.equal(found.memory.current.inner, start.memory.current.inner)
        starts = MemorizedStarts(model, documents, Memorize(levels=("level1",)), BOUNDARY)
        ModelScorer(model, batch_rows=4, starts=starts).score(documents)

    @pytest.mark.parametrize(
        ("name", "number"),  # texts of one period of the fastest level, of three and of four
        [("hope_in_context", 4), ("hope_in_context", 6), ("attention_in_context", 6), ("attention_in_context", 2)],
    )
    def test_chosen_levels_keep_their_clock(self, name, number, documents):
        model = build(name)
        names = level_names(model)
        following = torch.cat([torch.zeros(1, 1, dtype=torch.long), tokens(1, 25)], dim=1)

        def starts(levels):
            return MemorizedStarts(model, documents, Memorize(levels=levels), BOUNDARY).states([number])

        @torch.no_grad()
        def read(state, *cuts):
            """Logits after a memorised text, read up to each cut by itself."""
            logits = []
            for part in following.tensor_split(cuts, dim=1):
                output = model(part, state=state)
                state = output.state
                logits.append(output.logits)
            return torch.cat(logits, dim=1)

        everything = starts(names)
        torch.testing.assert_close(read(everything), read(starts(None)), rtol=0, atol=TOLERANCE)
        for state in (everything, starts(names[-1:])):
            whole = read(state)
            for cut in range(1, following.shape[1]):
                torch.testing.assert_close(read(state, cut), whole, rtol=0, atol=TOLERANCE)

    def test_chosen_levels_give_the_same_scores_without_sharing(self, documents):
        model = build("hope_in_context")
        starts = MemorizedStarts(model, documents, Memorize(levels=("level0", "level1")), BOUNDARY)
        shared, unshared = (
            ModelScorer(model, batch_rows=4, shared=shared, starts=starts).score(documents) for shared in (True, False)
        )
        assert_equal(shared, unshared)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("transformer", "passes=1", "writes no fast weights"),
            ("hope", "levels=memory+level0", "has no memory 'level0'; it has k, eta"),
            ("hope_in_context", "surprise=2", "write all rows at once"),
        ],
    )
    def test_what_a_model_cannot_do_is_refused(self, name, text, message):
        with pytest.raises(ConfigError, match=message):
            check_memorize(build(name), parse_memorize(text))

    def test_the_command_line(self):
        found = parse_memorize("passes=2, levels=memory+k,surprise=3.5")
        assert found == Memorize(passes=2, levels=("memory", "k"), surprise=3.5)
        assert found.name == "memorize x2, memory+k, above 3.5 nats"

    @pytest.mark.parametrize("text", ["", "2", "passes=0", "passes=a", "surprise=nan", "depth=1", "passes=1,passes=2"])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(ConfigError, match="--memorize"):
            parse_memorize(text)
