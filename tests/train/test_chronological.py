"""Orders of a chronological stream, replay, elastic weights and the probe."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_lm.checkpoint import list_checkpoints
from nested_lm.config.train import ElasticWeights
from nested_lm.data.chronology import reading_groups
from nested_lm.data.loader import Batch, PackedLoader
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import ConfigError, DataError, NumericsError
from nested_lm.train.hooks.elastic import ElasticPenalty, diagonal_fisher
from nested_lm.train.replay import Replay
from nested_lm.train.stream import TrainingStream
from nested_lm.train.trainer import train

PERIODS = 3


@pytest.fixture
def training(tiny_data):
    return TokenDataset.open(tiny_data.folder, "train")


def chronological(**settings):
    return {"stream": {"kind": "chronological", "periods": PERIODS} | settings}


class TestOrders:
    def test_reverse_is_forward_read_backwards(self, training):
        forward = reading_groups(training, PERIODS, order="forward")
        assert reading_groups(training, PERIODS, order="reverse") == forward[::-1]
        years = [int(training.documents[i].date) for group in forward for i in group.documents(training, seed=0)]
        assert years == sorted(years)

    def test_shuffled_deals_every_dated_document_once(self, training):
        groups = reading_groups(training, PERIODS, order="shuffled")
        dealt = [group.documents(training, seed=1) for group in groups]
        assert sorted(i for group in dealt for i in group) == list(range(len(training.documents)))
        tokens = [sum(training.documents[i].tokens for i in group) for group in dealt]
        assert max(tokens) < 1.5 * min(tokens)
        years = [{training.documents[i].period for i in group} for group in dealt]
        assert all(len(found) == 4 for found in years)  # each share has text of every time
        assert dealt != [group.documents(training, seed=2) for group in groups]

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            ((), "^no document of .* has a date;"),
            ((0,), "one chronological period; a chronological stream needs at least 2"),
            ((0, 1), "lie in 2 chronological periods, 3 are asked for\n  Lower train.stream.periods to at most 2"),
        ],
    )
    def test_too_few_dated_periods_are_refused_before_anything_is_written(
        self, training, make_config, monkeypatch, kept, message
    ):
        training.documents = [
            dataclasses.replace(row, period=row.period if row.period in kept else None) for row in training.documents
        ]
        with pytest.raises(DataError, match=message):
            reading_groups(training, PERIODS, order="shuffled")
        monkeypatch.setattr(TokenDataset, "open", lambda folder, split: training)
        config = make_config(**chronological())
        with pytest.raises(DataError, match=message):
            train(config)
        assert not Path(config.output_dir).exists()

    def test_a_period_is_read_once_at_most(self, make_config):
        with pytest.raises(DataError, match=r"would be read more than once.*\n.*Lower train.budget_tokens to at most"):
            train(make_config(budget_tokens=100_000, **chronological()))

    @pytest.mark.parametrize("order", ["reverse", "shuffled"])
    def test_milestones_count_stages_in_the_order_they_are_read(self, make_config, training, order):
        stream = TrainingStream(make_config(**chronological(order=order)), training, rank=0, world_size=1)
        assert [stream.milestone(step) for step in (0, 3, 6, 9)] == [f"period-{i}" for i in range(4)]
        assert stream.groups == reading_groups(training, PERIODS, order=order)


def rows_of(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch.inputs]


class TestReplay:
    def make(self, make_config, training, **settings):
        config = make_config(batch_size=2, accumulation=2, budget_tokens=12 * 64, **chronological(**settings))
        return TrainingStream(config, training, rank=0, world_size=1)

    def test_the_share_holds_and_only_what_was_read_comes_again(self, make_config, training):
        plain, replaying = (self.make(make_config, training, replay=share) for share in (0.0, 0.25))
        assert plain.total_steps == replaying.total_steps == 12
        read = []
        for stage in range(PERIODS):
            new = rows_of([batch for _ in range(4) for batch in plain.next_step()])
            found = rows_of([batch for _ in range(4) for batch in replaying.next_step()])
            assert len(found) == 16  # equal tokens
            old = [row for row in found if row in read]
            assert len(old) == (0 if stage == 0 else 4)
            assert [row for row in found if row not in read] == new[: 16 - len(old)]
            read += [row for row in found if row not in read]

    def test_earlier_groups_take_turns_and_start_again_after_what_was_read(self, training):
        def loader(period):
            return PackedLoader(training, context_length=16, batch_size=2, seed=0, align=1, periods=(period,))

        replay = Replay([loader(0), loader(1)], share=0.5, rows=2, world_size=1, micro_batches=2)
        first = rows_of([loader(0).next(4)])
        second = rows_of([loader(1).next(2)])  # its stage read four rows, half of them replayed
        assert [replay.rows_of(index) for index in range(2)] == [(1, 1), (1, 1)]
        assert rows_of(replay.next(1, index, 1) for index in range(2)) == first[:2]
        found = [rows_of([replay.next(2, index, 1)])[0] for index in range(8)]
        assert found[::2] == [first[2], first[3], first[0], first[1]]
        assert found[1::2] == [second[0], second[1]] * 2

    def test_a_share_that_leaves_nothing_new_is_refused(self, training):
        loader = PackedLoader(training, context_length=16, batch_size=1, seed=0, align=1)
        with pytest.raises(ConfigError, match=r"replay 0.999999 leaves none of the 0 rows|leaves none"):
            Replay([loader], share=0.999999, rows=1, world_size=1, micro_batches=0)

    def test_another_number_of_processes_is_refused(self, training):
        def replay(world_size):
            loader = PackedLoader(training, context_length=16, batch_size=1, seed=0, align=1, world_size=world_size)
            return Replay([loader], share=0.5, rows=1, world_size=world_size, micro_batches=4)

        with pytest.raises(DataError, match="that of 1 processes, this run has 2"):
            replay(2).load_state_dict(replay(1).state_dict())


class TestElasticWeights:
    def penalty(self):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        return weight, ElasticPenalty({"w": weight}, ElasticWeights(strength=4.0))

    def test_penalty_and_gradient_by_hand(self):
        weight, penalty = self.penalty()
        penalty.add_gradient()
        assert weight.grad is None  # nothing is held before the first border
        assert penalty.value() == 0.0
        penalty.consolidate({"w": torch.tensor([0.5, 0.0])})
        with torch.no_grad():
            weight += torch.tensor([1.0, 1.0])
        weight.grad = torch.tensor([10.0, 10.0])
        penalty.add_gradient()
        assert weight.grad.tolist() == [12.0, 10.0]  # 4 x 0.5 x 1; nothing where nothing depends on it
        assert penalty.value() == pytest.approx(0.5 * 4 * 0.5)
        penalty.consolidate({"w": torch.tensor([0.5, 1.0])})  # information adds up, the anchor moves
        assert penalty.value() == 0.0
        with torch.no_grad():
            weight += 1.0
        assert penalty.value() == pytest.approx(0.5 * 4 * (1.0 + 1.0))

    def test_state_round_trip_and_strangers(self):
        weight, penalty = self.penalty()
        penalty.consolidate({"w": torch.tensor([0.5, 0.25])})
        other = ElasticPenalty({"w": weight}, ElasticWeights(strength=4.0))
        other.load_state_tensors(penalty.state_tensors())
        with torch.no_grad():
            weight += 3.0
        assert other.value() == penalty.value() > 0
        with pytest.raises(ValueError, match="belongs to no parameter"):
            other.load_state_tensors({"fisher/v": torch.zeros(2)})
        with pytest.raises(ValueError, match="belongs to no parameter"):
            other.load_state_tensors({"fisher/w": torch.zeros(3)})

    def test_fisher_of_a_bias_is_the_variance_of_its_softmax(self):
        """For logits that are a bias b, the diagonal is p (1 - p), whatever the text."""
        bias = torch.nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))
        targets = torch.zeros(200, 64, dtype=torch.long)
        targets[:, 48:] = -100  # positions that are not scored do not count
        rows = Batch(torch.zeros_like(targets), targets, torch.zeros_like(targets, dtype=torch.bool))
        found = diagonal_fisher({"b": bias}, lambda row: bias.expand(*row.inputs.shape, 3), rows, seed=0)
        p = bias.detach().softmax(0)
        torch.testing.assert_close(found["b"], p * (1 - p), rtol=0.3, atol=0.0)  # 200 rows: about 10 % noise
        again = diagonal_fisher({"b": bias}, lambda row: bias.expand(*row.inputs.shape, 3), rows, seed=0)
        torch.testing.assert_close(again["b"], found["b"], rtol=0, atol=0)

    def test_information_that_is_not_finite_is_refused(self):
        bias = torch.nn.Parameter(torch.zeros(3))
        rows = Batch(*(torch.zeros(1, 4, dtype=torch.long) for _ in range(3)))

        def logits(row):
            return (bias * 1e30).expand(*row.inputs.shape, 3)

        with pytest.raises(NumericsError, match="Fisher information of b"):
            diagonal_fisher({"b": bias}, logits, rows, seed=0)

    def test_a_strong_penalty_keeps_weights_near_the_border(self, make_config):
        moved = {}
        for strength in (None, 1e6):
            ewc = {} if strength is None else {"ewc": {"strength": strength, "sequences": 2}}
            folder = f"ewc-{strength}"
            train(make_config(folder=folder, **chronological(), **ewc, optimizer=RATE))
            moved[strength] = distance(Path(make_config(folder=folder).output_dir))
        assert moved[1e6] < 0.9 * moved[None]


RATE = {"kind": "adamw", "rate": 1e-2, "weight_decay": 0.0}


def distance(folder):
    """How far the weights that matter most moved from the first border to the end."""
    from safetensors.torch import load_file

    paths = list_checkpoints(folder / "checkpoints")
    border = next(path for path in paths if path.name == "step-00000003")
    start, end = load_file(border / "model.safetensors"), load_file(paths[-1] / "model.safetensors")
    return float(sum((end[name] - start[name]).square().sum() for name in start) ** 0.5)


ALL = chronological(replay=0.25, order="reverse") | {
    "ewc": {"strength": 10.0, "sequences": 2},
    "probe": {"sequences": 2},
}


@pytest.mark.parametrize("model", ["transformer", "hope"])
def test_a_run_with_everything_goes_on_bit_for_bit(make_config, final_bytes, comparable, model):
    whole, config = make_config(model, folder="a", **ALL), make_config(model, folder="b", **ALL)
    train(whole)
    train(config)
    checkpoints = Path(config.output_dir) / "checkpoints"
    for path in list_checkpoints(checkpoints):  # as if it had been killed in the second period, after step 5
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    train(config)
    assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)
    assert comparable(config.output_dir) == comparable(whole.output_dir)
    names = [f"{Path(c.output_dir)}/checkpoints/step-00000009/elastic.safetensors" for c in (whole, config)]
    assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes()


def test_the_probe_is_logged_at_every_step_and_changes_nothing(make_config, final_bytes, records):
    probed = make_config(folder="a", **chronological(), probe={"sequences": 2})
    plain = make_config(folder="b", **chronological())
    train(probed)
    train(plain)
    assert final_bytes(probed.output_dir) == final_bytes(plain.output_dir)
    steps = records(probed.output_dir, "step")
    values = np.array([[row[f"probe/{period}"] for period in range(PERIODS)] for row in steps])
    assert values.shape == (9, PERIODS)
    assert (values > 0).all()
    assert len(np.unique(values[:, 0])) == 9


@pytest.mark.parametrize("section", [{"ewc": {"strength": 1.0}}, {"probe": {}}])
def test_looking_back_needs_periods_and_one_process(make_config, section):
    with pytest.raises(ConfigError, match="looks back at the periods"):
        make_config(**section)
    with pytest.raises(ConfigError, match="not been proven with strategy fsdp2"):
        make_config(**section, **chronological(), strategy="fsdp2")


def test_elastic_weights_and_nested_levels_are_refused(make_config):
    with pytest.raises(ConfigError, match="wiring nested the levels are set back"):
        make_config("nested", ewc={"strength": 1.0}, **chronological())
