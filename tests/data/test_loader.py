"""The loader's promises, for any context, batch, alignment, world size and point of interruption."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_lm.data import loader as loader_module
from nested_lm.data.loader import PackedLoader, evaluation_batches, period_plan
from nested_lm.data.packing import Pieces, fill, pack
from nested_lm.data.permutation import Permutation
from nested_lm.data.shards import DocumentRow, TokenDataset
from nested_lm.data.split import Period
from nested_lm.errors import DataError


class FakeDataset:
    """Documents whose tokens all differ, so that every token of a batch can be traced. Period None: undated."""

    def __init__(self, lengths, periods=None, num_periods=0):
        periods = periods or [None] * len(lengths)
        self.documents = [
            DocumentRow(str(i), "train", None, period, n, n, 0, 0, "")
            for i, (n, period) in enumerate(zip(lengths, periods, strict=True))
        ]
        starts = np.concatenate([[1], 1 + np.cumsum(lengths)])
        self.values = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
        self.periods = [Period(str(i), i, i) for i in range(num_periods)]
        self.data_hash, self.split, self.folder = "hash", "train", "folder"
        self.boundary = (0, 0)
        self.all_documents, self.all_bytes = len(lengths), sum(lengths)

    def tokens(self, index, start=0, stop=None):
        assert start <= (len(self.values[index]) if stop is None else stop) <= len(self.values[index])
        return self.values[index][start:stop]

    def owner(self):
        """Document of every token value."""
        return np.concatenate([[-1], np.repeat(np.arange(len(self.values)), [len(v) for v in self.values])])


@st.composite
def layouts(draw):
    """Document lengths, context length and an alignment that need not divide it."""
    context = draw(st.integers(1, 24))
    return (
        draw(st.lists(st.integers(1, 70), min_size=1, max_size=25)),
        context,
        draw(st.integers(1, context)),
    )


def make(dataset, context, align, *, batch_size=1, seed=0, **more):
    return PackedLoader(dataset, context_length=context, batch_size=batch_size, seed=seed, align=align, **more)


def epoch_rows(dataset, context, align, **more):
    """Rows of the first epoch."""
    loader = make(dataset, context, align, **more)
    rows = []
    while loader.epoch == 0:
        rows.append(loader.next())
    return rows


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks within an epoch of a few pieces."""
    monkeypatch.setattr(loader_module, "_BLOCK_PIECES", 7)


pytestmark = pytest.mark.usefixtures("small_blocks")
# The patched block size is the same for every example.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TestEpoch:
    @given(layout=layouts(), seed=st.integers(0, 5))
    @relaxed
    def test_every_token_is_a_target_exactly_once(self, layout, seed):
        lengths, context, align = layout
        rows = epoch_rows(FakeDataset(lengths), context, align, seed=seed)
        targets = Counter(torch.cat([row.targets.flatten() for row in rows]).tolist())
        padding = targets.pop(-100, 0)
        assert targets.pop(0) == len(lengths)  # the end of each document
        assert targets == Counter(range(1, 1 + sum(lengths)))
        assert padding + sum(lengths) + len(lengths) == len(rows) * context

    @given(layout=layouts())
    @relaxed
    def test_pieces_lie_whole_and_aligned_in_their_rows(self, layout):
        lengths, context, align = layout
        dataset = FakeDataset(lengths)
        owner = dataset.owner()
        for row in epoch_rows(dataset, context, align):
            inputs, targets, resets = (part[0].numpy() for part in row)
            assert resets[0]
            starts = np.flatnonzero(resets)
            assert (starts % align == 0).all()
            for start, stop in itertools.pairwise([*starts, context]):
                scored = targets[start:stop] != -100
                length = int(scored.sum())
                assert length >= 1
                assert scored[:length].all()  # padding only after the piece
                assert (inputs[start + length : stop] == 0).all()
                values = np.concatenate([inputs[start : start + length], targets[start + length - 1 : start + length]])
                assert len({int(owner[value]) for value in values if value}) == 1
                assert (inputs[start + 1 : start + length] == targets[start : start + length - 1]).all()
                first = dataset.values[owner[values[values > 0][0]]][0]
                # A piece starts with the start token or goes on where the document was cut.
                assert inputs[start] == 0 or (inputs[start] - first + 1) % context == 0

    def test_worked_example(self):
        """Documents 1 2 3 4 5 and 6, context 4, align 2: pieces 0 1 2 3 | 4 5 and 0 6."""
        rows = epoch_rows(FakeDataset([5, 1]), 4, 2)
        found = sorted((row.inputs[0].tolist(), row.targets[0].tolist(), row.resets[0].tolist()) for row in rows)
        full = ([0, 1, 2, 3], [1, 2, 3, 4], [True, False, False, False])
        one = ([0, 6, 4, 5], [6, 0, 5, 0], [True, False, True, False])
        other = ([4, 5, 0, 6], [5, 0, 6, 0], [True, False, True, False])
        assert found in ([full, one], [full, other])

    def test_epochs_and_seeds_have_their_own_order(self):
        dataset = FakeDataset([39] * 30)  # five whole pieces each
        rows = [epoch_rows(dataset, 8, 1, seed=seed) for seed in (0, 0, 1)]
        first, again, other = ([row.inputs[0, 1].item() for row in epoch] for epoch in rows)
        assert first == again
        assert first != other
        loader = make(dataset, 8, 1)
        epochs = [[loader.next().inputs[0, 1].item() for _ in first] for _ in range(2)]
        assert epochs[0] == first
        assert sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0] != epochs[1]

    def test_packing_wastes_little(self):
        rng = np.random.default_rng(0)
        rows = pack(rng.integers(1, 257, size=4000), 256, 16)
        used = sum(len(row) for row in rows)
        assert used == 4000
        assert len(rows) * 256 < 1.10 * 4000 * (128.5 + 7.5)  # mean length and mean loss to alignment


class TestWorldSize:
    @given(layout=layouts(), batch=st.integers(1, 3), world=st.integers(1, 4))
    @relaxed
    def test_ranks_share_the_rows_of_one_process(self, layout, batch, world):
        lengths, context, align = layout
        dataset = FakeDataset(lengths)
        single = make(dataset, context, align)
        ranks = [make(dataset, context, align, batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
        for _ in range(4):
            expected = [single.next() for _ in range(batch * world)]
            found = [rank.next() for rank in ranks]
            for part in range(3):
                assert torch.equal(
                    torch.cat([batch[part] for batch in expected]),
                    torch.cat([batch[part] for batch in found]),
                )


class TestResume:
    @given(layout=layouts(), batch=st.integers(1, 3), steps=st.integers(0, 30), world=st.integers(1, 3))
    @relaxed
    def test_goes_on_as_if_never_stopped_at_any_world_size(self, layout, batch, steps, world):
        lengths, context, align = layout
        dataset = FakeDataset(lengths)
        whole = make(dataset, context, align, batch_size=batch * world)
        for _ in range(steps):
            whole.next()
        state = json.loads(json.dumps(whole.state_dict()))
        assert len(json.dumps(state)) < 300
        resumed = [
            make(dataset, context, align, batch_size=batch, rank=rank, world_size=world) for rank in range(world)
        ]
        for loader in resumed:
            loader.load_state_dict(state)
        for _ in range(3):
            expected = whole.next()
            parts = [loader.next() for loader in resumed]
            for part in range(3):
                assert torch.equal(expected[part], torch.cat([batch[part] for batch in parts]))
        assert resumed[0].state_dict() == whole.state_dict()

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"seed": 1}, "seed"),
            ({"context": 9}, "context_length"),
            ({"align": 2}, "align"),
            ({"periods": (0,)}, "periods"),
            ({"data_hash": "other"}, "data_hash"),
        ],
    )
    def test_refuses_the_position_of_another_order(self, change, key):
        dataset = FakeDataset([5, 6], periods=[0, 1], num_periods=2)
        state = make(dataset, 8, 1).state_dict()
        dataset.data_hash = change.pop("data_hash", "hash")
        arguments = {"context": 8, "align": 1} | change
        other = make(dataset, arguments.pop("context"), arguments.pop("align"), **arguments)
        with pytest.raises(DataError, match=f"another order of the data: {key} was"):
            other.load_state_dict(state)


class TestPeriods:
    def test_only_documents_of_the_periods(self):
        dataset = FakeDataset([5, 6, 7, 8], periods=[0, 1, None, 1], num_periods=2)
        rows = epoch_rows(dataset, 4, 1, periods=(1,))
        owner = dataset.owner()
        seen = {int(owner[t]) for row in rows for t in row.targets.flatten().tolist() if t > 0}
        assert seen == {1, 3}

    def test_no_document_left(self):
        dataset = FakeDataset([5], periods=[0], num_periods=2)
        with pytest.raises(DataError, match=r"no documents of the periods \[1\]"):
            make(dataset, 4, 1, periods=(1,))

    @given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=9), groups=st.integers(1, 6), data=st.data())
    @relaxed
    def test_plan_is_the_best_of_all_cuts(self, lengths, groups, data):
        filled = [(i, n) for i, n in enumerate(lengths) if n]
        dataset = FakeDataset(
            [n for _, n in filled] + [9], periods=[i for i, _ in filled] + [None], num_periods=len(lengths)
        )
        if len(filled) < groups:
            with pytest.raises(
                DataError, match=r"has a date;|one chronological period;|lie in . chronological periods, "
            ):
                period_plan(dataset, groups)
            return
        plan = period_plan(dataset, groups)
        assert [i for group in plan for i in group] == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in group) for group in plan]
        assert min(sums) > 0

        def cost(borders):
            parts = [sum(lengths[a:b]) for a, b in itertools.pairwise([0, *borders, len(lengths)])]
            return sum(part**2 for part in parts) if min(parts) > 0 else np.inf

        cuts = itertools.combinations(range(1, len(lengths)), groups - 1)
        assert sum(part**2 for part in sums) == min(cost(borders) for borders in cuts)


class TestEvaluation:
    @given(layout=layouts(), batch=st.integers(1, 4))
    @relaxed
    def test_all_tokens_once_with_their_documents(self, layout, batch):
        lengths, context, align = layout
        dataset = FakeDataset(lengths)
        owner = dataset.owner()
        batches = list(evaluation_batches(dataset, context, batch, align))
        inputs, targets, _, documents = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert Counter(targets[targets > 0].tolist()) == Counter(range(1, 1 + sum(lengths)))
        assert torch.equal(documents == -1, targets == -100)
        for values in (inputs, targets):
            real = values > 0
            assert torch.equal(torch.from_numpy(owner)[values[real]], documents[real])
        again = list(evaluation_batches(dataset, context, batch, align))
        assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))

    def test_limit_spreads_over_the_split(self):
        dataset = FakeDataset([31] * 50)
        batches = list(evaluation_batches(dataset, 8, 4, 1, max_tokens=400))
        assert sum(int((b.targets != -100).sum()) for b in batches) == 400
        documents = torch.cat([b.documents.flatten() for b in batches]).unique()
        assert len(documents) >= 48
        assert list(evaluation_batches(dataset, 8, 4, 1, max_tokens=10**9))[-1].inputs.shape[1] == 8

    def test_empty_split(self):
        with pytest.raises(DataError, match="no documents"):
            next(evaluation_batches(FakeDataset([]), 8, 1, 1))


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 99)))
@relaxed
def test_permutation_is_a_bijection_in_any_chunks(size, key):
    permutation = Permutation(size, *key)
    whole = permutation(np.arange(size))
    assert np.array_equal(np.sort(whole), np.arange(size))
    parts = np.concatenate([permutation(np.arange(start, min(start + 100, size))) for start in range(0, size, 100)])
    assert np.array_equal(parts, whole)


def test_permutation_looks_random():
    """Fixed points, neighbours and correlation are what chance gives."""
    size = 100_000
    values = Permutation(size, 3, 0)(np.arange(size))
    assert np.count_nonzero(values == np.arange(size)) < 10  # 1 expected
    assert np.count_nonzero(np.diff(values) == 1) < 10  # 1 expected
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 0.02  # standard error 0.003
    quarters = np.histogram2d(values, np.arange(size), bins=4)[0]
    assert np.abs(quarters / (size / 16) - 1).max() < 0.06  # standard error 0.013


def test_permutation_is_the_same_in_every_version():
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [1, 4, 6, 5, 7, 3, 8, 9, 0, 2]


def test_real_data_is_read_as_it_was_written(tiny_data):
    dataset = TokenDataset.open(tiny_data.folder, "train")
    loader = make(dataset, 64, 16, batch_size=4)
    seen = Counter()
    while loader.epoch == 0:
        batch = loader.next()
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == (4, 64)
        seen.update(batch.targets[batch.targets >= 0].tolist())
    expected = Counter({0: len(dataset.documents)})
    for index in range(len(dataset.documents)):
        expected.update(dataset.tokens(index).tolist())
    extra = seen - expected  # the last batch reaches into the next epoch
    assert not expected - seen
    assert sum(extra.values()) < 4 * 64
    assert loader.epoch_tokens == dataset.num_tokens + len(dataset.documents)


def test_fill_reads_across_shards(make_config):
    from nested_lm.data.pipeline import build

    folder = build(make_config(shard_tokens=1024), report=lambda line: None)
    dataset = TokenDataset.open(folder, "train")
    assert dataset.documents[-1].shard > 0
    last = len(dataset.documents) - 1
    pieces = Pieces.of(dataset, np.array([last]), 10_000)
    row = fill(dataset, pieces, pack(pieces.positions, 10_000, 1))
    count = dataset.documents[last].tokens
    assert np.array_equal(row.targets[0, :count], dataset.tokens(last))
