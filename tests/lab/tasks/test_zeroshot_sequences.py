"""Log-likelihoods of documents, and memorised texts: the same numbers as one sequence at a time."""

import numpy as np
import pytest
import torch

from nested_lm.errors import ConfigError
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading.reader import Scored
from nested_lm_lab.tasks.zeroshot.memorize import MemorizedStarts, check_memorize, level_names, shared_text
from nested_lm_lab.tasks.zeroshot.sequences import Likelihood, ModelScorer
from nested_lm_lab.tasks.zeroshot.settings import Memorize, parse_memorize
from tests.reading.models import alone, build, document, tokens, trees

TOLERANCE = 1e-10  # float64; forks and batches change rounding only
BOUNDARY = (0, 0)


@pytest.fixture(scope="module")
def documents():
    return trees()


def assert_equal(found, expected, tolerance=TOLERANCE):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for a, b in zip(row, wanted, strict=True):
            assert a.nats == pytest.approx(b.nats, abs=tolerance)
            assert a.greedy == b.greedy


def test_likelihoods_are_those_of_the_tokens(documents):
    model = build("hope")
    wanted = [[alone(model, sequence) for sequence in entry] for entry in documents]
    expected = [[Likelihood(scores.total, scores.greedy) for scores in row] for row in wanted]
    assert_equal(ModelScorer(model, batch_rows=4).score(documents), expected)


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
                assert got.nats == pytest.approx(alone(model, whole).total, abs=1e-8)

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
        losses = [alone(model, Scored(entry[0].tokens[:5], 1)).nats.mean() for entry in entries]
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
