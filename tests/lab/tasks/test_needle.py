from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nested_lm.config.evaluation import Passkey
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.tasks.language_modelling import Reading
from nested_lm_lab.tasks.needles.passkey import depths, evaluate

READING = Reading(context_length=32, batch_size=4, align=4)


@dataclass(frozen=True)
class Read:
    """What each stream has read."""

    texts: tuple[tuple[int, ...], ...]

    @property
    def position(self):
        return len(self.texts[0])

    def select(self, rows):
        return Read(tuple(self.texts[row] for row in rows.tolist()))


class Copier(nn.Module):
    """Predicts what followed the last place where the same eight tokens stood; knows nothing else."""

    has_constant_state = reads_branches = False
    config = SimpleNamespace(alignment=1, writes_in_context=False, vocab_size=300)

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def initial_state(self, rows):
        return Read(((),) * rows)

    def predict(self, tokens, places, *, state, rows=None, **_):
        before = state if rows is None else state.select(rows)
        texts = tuple((*text, *more) for text, more in zip(before.texts, tokens.tolist(), strict=True))
        logits = torch.zeros(1, len(places), 300)
        for number, (row, column) in enumerate(places.tolist()):
            ids = texts[row][: before.position + column + 1]
            self.answer(ids, logits[0, number])
        return SimpleNamespace(logits=logits, state=Read(texts))

    def answer(self, ids, logits):
        following = {ids[t - 7 : t + 1]: ids[t + 1] for t in range(7, len(ids) - 1)}
        if (seen := ids[-8:]) in following:
            logits[following[seen]] = 9.0


class Blind(Copier):
    """Cannot tell any token from another."""

    def answer(self, ids, logits):
        pass


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


def run(model, tokenizer, *, lengths=(96, 160), samples=5):
    config = Passkey(lengths=lengths, samples=samples)
    return evaluate(model, tokenizer, config, reading=READING, bootstrap=Bootstrap(samples=200))


def test_a_model_that_copies_finds_every_key_and_only_where_it_stands(tokenizer):
    metrics = run(Copier(), tokenizer)
    for length in metrics.lengths:
        assert length.exact.value == 1.0
        assert length.exact.low < 1.0  # five of five is no proof of always
        assert length.control_exact.value == 0.0
        assert length.median_first_rank == 1
        assert length.nats_per_token.value < 0.1
        assert length.control_nats_per_token.value > 3.0
        assert length.worth.value == pytest.approx(
            length.control_nats_per_token.value - length.nats_per_token.value, rel=1e-9
        )
        assert length.worth.low > 0


def test_a_model_without_memory_gains_nothing_from_the_key(tokenizer):
    for length in run(Blind(), tokenizer).lengths:
        assert length.worth.value == 0.0
        assert length.exact.value == 0.0  # all tokens are equally likely: no first choice
        assert length.median_first_rank == 300
        assert length.nats_per_token.value == pytest.approx(torch.log(torch.tensor(300.0)).item(), rel=1e-6)


def test_depths_are_spread_from_start_to_end(tokenizer):
    assert depths(1) == [0.5]
    assert depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    samples = run(Copier(), tokenizer, lengths=(96,)).lengths[0].samples
    assert [sample.depth for sample in samples] == depths(5)


def test_segments_and_batches_change_no_score(make_model, tokenizer):
    model = make_model("self_modifying")
    config = Passkey(lengths=(100,), samples=3)
    found = [
        evaluate(
            model,
            tokenizer,
            config,
            reading=Reading(context_length=context, batch_size=rows, align=4),
            bootstrap=Bootstrap(samples=100),
        )
        .lengths[0]
        .nats_per_token.value
        for context, rows in ((16, 1), (32, 6), (4096, 2))
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(DataError, match="no room for the key"):
        run(Copier(), tokenizer, lengths=(8,))
