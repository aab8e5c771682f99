"""Stages of growing context: whole steps of constant tokens, documents of their own, exact resume across a border."""

import itertools

import pytest
import torch

from nested_lm.checkpoint import list_checkpoints, verify_checkpoint
from nested_lm.data.loader import PackedLoader
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import ConfigError
from nested_lm.train.recorder import Recorder
from nested_lm.train.signals import StopRequest
from nested_lm.train.stream import TrainingStream
from nested_lm.train.trainer import train

STEP_TOKENS = 64 * 1 * 2
CURRICULUM = [
    {"context_length": 16, "until_tokens": 2 * STEP_TOKENS},
    {"context_length": 32, "until_tokens": 5 * STEP_TOKENS},
]
STAGES = {"context_length": 64, "curriculum": CURRICULUM, "budget_tokens": 8 * STEP_TOKENS}
SHAPES = [(4, 16)] * 2 + [(2, 32)] * 3 + [(1, 64)] * 3  # of a micro-batch, step by step


@pytest.fixture
def dataset(tiny_data):
    return TokenDataset.open(tiny_data.folder, "train")


def test_stages_change_on_whole_steps_of_constant_tokens(make_config, dataset):
    stream = TrainingStream(make_config(**STAGES), dataset, rank=0, world_size=1)
    assert stream.total_steps == len(SHAPES)
    for shape in SHAPES:
        assert [tuple(batch.inputs.shape) for batch in stream.next_step()] == [shape, shape]
    assert [stream.milestone(step) for step in range(9)] == [None, None, "context-16", None, None, "context-32"] + [
        None
    ] * 3


def test_two_ranks_share_every_stage(make_config, dataset):
    config = make_config(**STAGES | {"batch_size": 2, "accumulation": 1})
    alone = TrainingStream(config, dataset, rank=0, world_size=1)
    ranks = [TrainingStream(config, dataset, rank=rank, world_size=2) for rank in range(2)]
    for _ in SHAPES:
        (whole,) = alone.next_step()
        parts = [batch for stream in ranks for batch in stream.next_step()]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)


def test_no_document_is_read_in_two_stages_and_each_by_its_share(dataset):
    borders = [0.0, 0.25, 0.625, 1.0]
    parts = [
        PackedLoader(dataset, context_length=16, batch_size=1, seed=3, align=1, part=(begin, end))
        for begin, end in itertools.pairwise(borders)
    ]
    documents = [set(part._pieces.documents.tolist()) for part in parts]
    assert sorted(index for part in documents for index in part) == list(range(len(dataset.documents)))
    total = sum(part.epoch_tokens for part in parts)
    longest = max(row.tokens + 1 for row in dataset.documents)
    for part, share in zip(parts, (0.25, 0.375, 0.375), strict=True):
        assert abs(part.epoch_tokens - share * total) <= longest
    assert documents[0] != set(range(len(documents[0])))  # drawn, not the first ones
    other = PackedLoader(dataset, context_length=16, batch_size=1, seed=4, align=1, part=(0.0, 0.25))
    assert set(other._pieces.documents.tolist()) != documents[0]


@pytest.mark.parametrize("stop_after", [1, 2, 4, 5, 7])
def test_a_run_that_stops_around_a_border_continues_bit_for_bit(
    make_config, monkeypatch, comparable, final_bytes, stop_after
):
    whole = make_config(folder="whole", **STAGES)
    train(whole)
    config = make_config(folder="stopped", **STAGES)
    event, requests = Recorder.event, []
    enter = StopRequest.__enter__

    def entered(self):
        requests.append(self)
        return enter(self)

    def stopping(self, name, progress, fields, *, note=None):
        event(self, name, progress, fields, note=note)
        if name == "step" and progress.step == stop_after and len(requests) == 1:
            requests[0].set("SIGTERM")

    monkeypatch.setattr(StopRequest, "__enter__", entered)
    monkeypatch.setattr(Recorder, "event", stopping)
    assert train(config).step == stop_after
    assert train(config).stopped_by is None
    assert comparable(config.output_dir) == comparable(whole.output_dir)
    assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)


def test_the_model_at_each_border_is_kept(make_config):
    config = make_config(**STAGES | {"checkpoints": {"every_tokens": 100 * STEP_TOKENS, "keep": 1}})
    folder = train(config).folder
    kept = {path.name: verify_checkpoint(path)["milestone"] for path in list_checkpoints(folder / "checkpoints")}
    assert kept == {"step-00000002": "context-16", "step-00000005": "context-32", "step-00000008": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"curriculum": [{"context_length": 48, "until_tokens": 256}]},
            "(?s)48 does not divide .*64.*try 32",
        ),
        (
            {"curriculum": [{"context_length": 16, "until_tokens": 200}]},
            "(?s)not a whole number .*128.*try 256",
        ),
        ({"curriculum": CURRICULUM[::-1]}, r"curriculum\[1\].until_tokens 256 must lie after 640"),
        ({"curriculum": [{"context_length": 16, "until_tokens": 1024}]}, "before the end of the budget, 1,024"),
        ({"stream": {"kind": "chronological", "periods": 2}}, "needs a shuffled stream"),
    ],
)
def test_stages_that_cannot_run_are_refused(make_config, change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**STAGES | change)


def test_every_stage_fits_the_chunks_of_the_model(make_config):
    with pytest.raises(ConfigError, match=r"train\.curriculum\[0\]\.context_length 4 is not a multiple of 8"):
        make_config("hope", context_length=16, accumulation=2, curriculum=[{"context_length": 4, "until_tokens": 32}])


def test_facts_are_the_same_for_two_ranks_and_after_a_resume(make_config, dataset):
    facts = {"share": 1.0, "every_tokens": 64, "kinds": ["note"], "distances": [0, 32]}
    stages = {"context_length": 128, "curriculum": [{"context_length": 64, "until_tokens": 512}]}
    config = make_config(**stages, batch_size=2, budget_tokens=2048, stream={"kind": "shuffled", "facts": facts})
    alone = TrainingStream(config, dataset, rank=0, world_size=1)
    ranks = [TrainingStream(config, dataset, rank=rank, world_size=2) for rank in range(2)]
    plain = TrainingStream(make_config(**stages, batch_size=2, budget_tokens=2048), dataset, rank=0, world_size=1)
    for _ in range(2):
        whole = torch.cat([batch.inputs for batch in alone.next_step()])
        parts = [batch for stream in ranks for batch in stream.next_step()]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole)
        assert not torch.equal(torch.cat([batch.inputs for batch in plain.next_step()]), whole)
    again = TrainingStream(config, dataset, rank=0, world_size=1)
    again.load_state_dict(alone.state_dict())
    assert all(torch.equal(*pair) for pair in zip(alone.next_step()[0], again.next_step()[0], strict=True))


def test_distances_beyond_the_stream_are_refused(make_config):
    facts = {"share": 1.0, "every_tokens": 64, "distances": [0, 64]}
    with pytest.raises(ConfigError, match=r"reach 64 tokens, and a row of the stream has 64"):
        make_config(context_length=64, stream={"kind": "shuffled", "facts": facts})
    few = facts | {"distances": [0, 9], "every_tokens": 16, "keys": ["a", "b", "c"]}
    with pytest.raises(ConfigError, match=r"3 different keys, and a row of 64 tokens has up to 4 facts"):
        make_config(context_length=64, stream={"kind": "shuffled", "facts": few})
