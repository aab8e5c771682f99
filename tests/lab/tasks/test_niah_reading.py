"""Reading with shared prefixes: the numbers of reading each prompt alone, within memory."""

import numpy as np
import pytest
import torch

from nested_lm.config.load import load_run
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.calls import OutOfRoomError
from nested_lm_lab.tasks.needles.reading import MIB, Reader, part_ways, segment_length

TOLERANCE = 2e-4  # float32, logits of order 1


def build(preset, *overrides):
    model = LanguageModel(load_run(preset, ["model.width=32", "model.num_layers=1", *overrides]).model).eval()
    model.initialise(1)
    with torch.no_grad():
        model.embedding.weight.mul_(10.0)
    return model


def prompts(length=700):
    """Six prompts of two texts: three begin alike for 600, 300 and 10 tokens, one is another's copy."""
    rng = np.random.default_rng(0)
    base, other = rng.integers(0, 2048, size=(2, length))
    rows = [base.copy() for _ in range(5)] + [other]
    for row, at in zip(rows[1:4], (600, 300, 10), strict=True):
        row[at:] = rng.integers(0, 2048, size=length - at)
    return np.stack(rows)


@pytest.mark.parametrize(
    "preset", ["hope/demo", "hope/demo_in_context", "baselines/transformer_demo", "baselines/titans_mag_demo"]
)
@torch.no_grad()
def test_shared_prefixes_change_no_state_and_save_reading(preset):
    model = build(preset)
    told = []
    reader = Reader(model, 1024 * MIB, told.append)
    texts = prompts()
    state = reader.read(texts)
    assert state.position == 700
    question = torch.randint(0, 2048, (6, 20), generator=torch.Generator().manual_seed(0))
    found = model(question, state=state).logits
    states = [model(torch.from_numpy(text[None])).state for text in texts]
    alone = torch.cat([model(question[row : row + 1], state=state).logits for row, state in enumerate(states)])
    torch.testing.assert_close(found, alone, atol=TOLERANCE, rtol=0)
    assert sum(told) == texts.size
    # The copy costs nothing, the others what lies behind the border of 128 tokens before they part.
    assert reader.tokens_read == 700 + (700 - 512) + (700 - 256) + 700 + 700


@pytest.mark.parametrize(
    ("preset", "reach"),
    [
        ("hope/demo", 6),  # two layers, three tokens each
        ("baselines/titans_lmm_demo", 6),
        ("hope/demo_in_context", None),
        ("baselines/gated_delta_net_demo", None),
        ("baselines/titans_mag_demo", None),
        ("baselines/transformer_demo", None),
    ],
)
@torch.no_grad()
def test_without_writes_only_what_a_state_depends_on_is_read(preset, reach):
    model = build(preset, "model.num_layers=2")
    assert model.frozen_reach == reach
    told = []
    reader = Reader(model, 1024 * MIB, told.append)
    texts = prompts()[:, -300:]
    question = torch.randint(0, 2048, (6, 20), generator=torch.Generator().manual_seed(0))
    found = model(question, state=reader.read(texts, writes=False)).logits
    whole = model(torch.from_numpy(texts), state=model.initial_state(6).freeze()).state
    torch.testing.assert_close(found, model(question, state=whole).logits, atol=TOLERANCE, rtol=0)
    assert sum(told) == texts.size
    if reach is not None:
        assert reader.tokens_read <= 6 * reach
        assert not torch.allclose(found, model(question, state=reader.read(texts)).logits, atol=TOLERANCE)
        less = model(torch.from_numpy(texts[:, 301 - reach :]), state=model.initial_state(6).freeze()).state
        assert not torch.allclose(found, model(question, state=less).logits, atol=TOLERANCE)


def test_a_recurrent_state_takes_the_same_memory_at_every_length():
    model = build("hope/demo")
    reader = Reader(model, 1024 * MIB, lambda tokens: None)
    tokens = np.random.default_rng(0).integers(0, 2048, size=(1, 2048))
    sizes = {length: reader.read(tokens[:, :length]).num_bytes() for length in (64, 1000, 2048)}
    assert len(set(sizes.values())) == 1
    growing = Reader(build("baselines/transformer_demo"), 1024 * MIB, lambda tokens: None)
    assert growing.read(tokens[:, :2000]).num_bytes() == 2 * growing.read(tokens[:, :1000]).num_bytes()


def test_a_cache_beyond_the_limit_is_refused_before_much_is_read():
    model = build("baselines/transformer_demo")
    reader = Reader(model, 1 * MIB, lambda tokens: None)
    tokens = np.zeros((3, 8192), dtype=np.int64)
    with pytest.raises(OutOfRoomError, match=r"3 states of 8,192 tokens: 1\d MiB .* the limit is 1 MiB"):
        reader.read(tokens)
    assert reader.tokens_read == 0
    assert reader.read(tokens[:1, :512]).position == 512


def test_prompts_part_in_the_order_of_their_rows():
    part = np.array([[1, 1], [1, 2], [1, 1], [1, 1]])
    parents, first, group = part_ways(np.array([0, 0, 1, 0]), part)
    assert (parents, first, group.tolist()) == ([0, 0, 1], [0, 1, 2], [0, 1, 2, 0])


def test_segments_are_multiples_of_chunks():
    assert segment_length(2048, 32) == 256
    assert segment_length(10, 32) == 128
    assert segment_length(1 << 19, 32) == 512
    assert segment_length(1 << 19, 48) == 528
    assert segment_length(2048, 4096) == 4096
