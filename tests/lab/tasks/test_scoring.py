import numpy as np
import pytest
import torch

from nested_lm.data.token_bytes import bytes_per_token
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import token_losses
from nested_lm.reading.held_out import position_edges, score_streaming, score_window, scored_sizes

CONTEXT = 16
BOTH = pytest.mark.parametrize("kind", ["attention", "self_modifying"])
# float32 sums of some hundred losses; rows of another batch shape are computed by other kernels.
CLOSE = {"rtol": 2e-5}


def window(model, dataset, chosen=None, *, batch_size=4, context=CONTEXT):
    chosen = list(range(len(dataset.documents))) if chosen is None else chosen
    return score_window(model, dataset, chosen, context_length=context, batch_size=batch_size)


def streaming(model, dataset, chosen=None, *, batch_size=4, state=None):
    chosen = range(len(dataset.documents)) if chosen is None else chosen
    texts = [dataset.tokens(index) for index in chosen]
    return score_streaming(model, texts, batch_size=batch_size, state=state)


@torch.no_grad()
def one_by_one(model, dataset, *, context):
    """Nats of each document by the plainest code: pieces of the stream 0 + tokens + 0, one call each."""
    sums = []
    for index in range(len(dataset.documents)):
        stream = torch.tensor([0, *dataset.tokens(index).tolist(), 0])
        nats = 0.0
        for start in range(0, len(stream) - 1, context):
            inputs, targets = stream[:-1][start : start + context], stream[1:][start : start + context]
            nats += float(token_losses(model(inputs[None]).logits, targets[None]).double().sum())
        sums.append(nats)
    return np.array(sums)


@BOTH
def test_window_scores_equal_one_piece_at_a_time(make_model, held_out, kind):
    model = make_model(kind)
    scores = window(model, held_out)
    np.testing.assert_allclose(scores.nats, one_by_one(model, held_out, context=CONTEXT), **CLOSE)
    assert scores.tokens.tolist() == [row.tokens + 1 for row in held_out.documents]


def test_streaming_scores_equal_one_long_pass(make_model, held_out):
    model = make_model("self_modifying")
    scores = streaming(model, held_out)
    np.testing.assert_allclose(scores.nats, one_by_one(model, held_out, context=10_000), **CLOSE)
    assert scores.tokens.tolist() == [row.tokens + 1 for row in held_out.documents]


def test_streaming_equals_window_where_the_document_fits_one_window_and_only_there(make_model, held_out):
    model = make_model("self_modifying")
    fits = np.array([row.tokens + 1 <= CONTEXT for row in held_out.documents])
    assert fits.any()
    assert not fits.all()
    carried, fresh = streaming(model, held_out).nats, window(model, held_out).nats
    np.testing.assert_allclose(carried[fits], fresh[fits], **CLOSE)
    assert (np.abs(carried - fresh)[~fits] > 1e-3).all()


@pytest.mark.parametrize("score", [window, streaming])
def test_order_and_company_of_documents_change_no_score(make_model, held_out, score):
    model = make_model("self_modifying")
    order = np.random.default_rng(0).permutation(len(held_out.documents))
    straight = score(model, held_out).nats
    np.testing.assert_allclose(score(model, held_out, order.tolist()).nats, straight[order], **CLOSE)
    some = order[:3].tolist()
    np.testing.assert_allclose(score(model, held_out, some).nats, straight[some], **CLOSE)


@pytest.mark.parametrize("score", [window, streaming])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_score(make_model, held_out, score, batch_size):
    model = make_model("self_modifying")
    expected = score(model, held_out).nats
    np.testing.assert_allclose(score(model, held_out, batch_size=batch_size).nats, expected, **CLOSE)


@pytest.mark.parametrize("score", [window, streaming])
def test_positions_add_up_and_count_from_a_fresh_state(make_model, held_out, score):
    scores = score(make_model("self_modifying"), held_out)
    np.testing.assert_allclose(scores.position_nats.sum(axis=1), scores.nats, rtol=1e-12)
    np.testing.assert_array_equal(scores.position_tokens.sum(axis=1), scores.tokens)
    last = CONTEXT if score is window else int(scores.tokens.max())
    assert scores.edges[-2] < last <= scores.edges[-1]
    if score is window:  # 4 of the first 4 positions in every whole piece
        pieces = -(-scores.tokens // CONTEXT)
        whole = pieces * 4 - np.maximum(4 - (scores.tokens - (pieces - 1) * CONTEXT), 0)
        np.testing.assert_array_equal(scores.position_tokens[:, 0], whole)
    else:
        np.testing.assert_array_equal(scores.position_tokens[:, 0], np.minimum(scores.tokens, 4))


def test_edges_double():
    assert position_edges(256) == (0, 4, 8, 16, 32, 64, 128, 256)
    assert position_edges(257)[-1] == 512
    assert position_edges(1) == (0, 4)


def test_a_lent_state_is_used_and_never_changed(make_model, held_out):
    model = make_model("self_modifying")
    with torch.no_grad():
        lent = model(torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))).state
    before = [tensor.clone() for tensor in tensors_of(lent)]
    first = streaming(model, held_out, state=lent).nats
    again = streaming(model, held_out, state=lent).nats
    for tensor, kept in zip(tensors_of(lent), before, strict=True):
        assert torch.equal(tensor, kept)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - streaming(model, held_out).nats).max() > 1e-3


def tensors_of(state):
    found = []
    state.map(lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize("limit", [1, 3])
def test_a_part_of_the_pieces_is_spread_over_the_document_with_its_own_bytes(make_model, held_out, limit):
    model = make_model("self_modifying")
    everything = list(range(len(held_out.documents)))
    options = {"context_length": CONTEXT, "max_pieces": limit}
    scores = score_window(model, held_out, everything, batch_size=4, **options)
    sizes, counts = scored_sizes(held_out, everything, token_bytes=bytes_per_token(held_out), **options)
    for index, row in enumerate(held_out.documents):
        stream = [0, *held_out.tokens(index).tolist(), 0]
        starts = list(range(0, len(stream) - 1, CONTEXT))
        wanted = sorted({starts[round(at)] for at in np.linspace(0, len(starts) - 1, min(limit, len(starts)))})
        nats, targets = 0.0, []
        for start in wanted:
            part = torch.tensor(stream[start : start + CONTEXT + 1])
            with torch.no_grad():
                nats += float(token_losses(model(part[None, :-1]).logits, part[None, 1:]).double().sum())
            targets += part[1:].tolist()
        assert scores.nats[index] == pytest.approx(nats, rel=2e-5)
        assert scores.tokens[index] == counts[index] == len(targets)
        if len(wanted) == len(starts):
            assert sizes[index] == row.bytes
        text = TextTokenizer.load(held_out.folder / "tokenizer.json").decode([t for t in targets if t])
        assert sizes[index] == len(text.encode())


def test_no_graph_is_kept(make_model, held_out):
    model = make_model("self_modifying")
    with torch.enable_grad():
        streaming(model, held_out, [0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_streaming_scores_use_the_boundary_tokens_given(make_model, held_out):
    model = make_model("self_modifying")
    texts = [held_out.tokens(0)]
    found = score_streaming(model, texts, batch_size=1, boundary=(7, 9)).nats[0]
    stream = torch.tensor([[7, *texts[0].tolist(), 9]])
    with torch.no_grad():
        expected = token_losses(model(stream[:, :-1]).logits, stream[:, 1:]).double().sum().item()
    np.testing.assert_allclose(found, expected, **CLOSE)
