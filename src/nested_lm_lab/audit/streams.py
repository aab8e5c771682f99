"""Streams: causality, split anywhere, rows and documents that do not see each other.

All in float64. Shapes: B batch, T tokens, V vocabulary.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm_lab.audit.finding import Finding, at_least, at_most, does_not_apply
from nested_lm_lab.audit.probe import difference, state_tensors, worst_difference
from nested_lm_lab.audit.shrink import span
from nested_lm_lab.audit.subject import Subject

SAME_SHAPES = 1e-12
"""Limit where two passes run the same products on tensors of the same shapes: only unlike content can differ."""

OTHER_SHAPES = 1e-10
"""Limit where two passes sum in another order: rounding of some hundred chained products in float64."""

NOTICED = 1e-9
"""Smallest change that counts as one. A check that looks for no change also shows that it could have seen one."""


@torch.no_grad()
def causality(subject: Subject) -> list[Finding]:
    """Change one token; logits before it must not move, and those at it must.

    The places are the tokens beside every border of a chunk, window or in-context period, the second, and the last:
    row i of the batch is row 0 with place i changed. The stream is read once whole and once in two calls.
    """
    model, length = subject.build(), subject.length
    places = _places(subject)
    tokens = subject.random_tokens(1, length).repeat(len(places) + 1, 1)
    for row, place in enumerate(places, start=1):
        tokens[row, place] = (tokens[row, place] + 1) % subject.config.vocab_size
    findings = []
    for label, logits in (
        ("one call", model(tokens).logits),
        ("two calls", _in_calls(model, tokens, [length // 3])[0]),
    ):
        scale = logits[0].abs().max()
        early = max(_change(logits, row, slice(0, place)) for row, place in enumerate(places, start=1))
        late = min(_change(logits, row, slice(place, place + 1)) for row, place in enumerate(places, start=1))
        findings += [
            at_most(f"change of logits before the changed token, {label}", early / scale, SAME_SHAPES),
            at_least(f"change of logits at the changed token, {label}", late / scale, NOTICED),
        ]
    return findings


@torch.no_grad()
def split(subject: Subject) -> list[Finding]:
    """Cut a stream and carry the state: logits and final state must be those of one pass."""
    model, length = subject.build(), subject.length
    tokens = subject.random_tokens(2, length)
    whole = model(tokens)
    logits, states = [], []
    cuts = _places(subject)
    for cut in cuts:
        found, state = _in_calls(model, tokens, [cut])
        logits.append(difference(found, whole.logits))
        states.append(_state_difference(state, whole.state))
    single, state = _in_calls(model, tokens, list(range(1, length)))
    fresh = difference(model(tokens[:, length // 2 :]).logits, whole.logits[:, length // 2 :])
    where = f"worst of cuts at {', '.join(map(str, cuts))}"
    return [
        at_most(f"logits, {where}", max(logits), OTHER_SHAPES),
        at_most(f"final state, {where}", max(states), OTHER_SHAPES),
        at_most("logits, token by token", difference(single, whole.logits), OTHER_SHAPES),
        at_most("final state, token by token", _state_difference(state, whole.state), OTHER_SHAPES),
        at_least("change of logits when the state is dropped", fresh, NOTICED),
    ]


def isolation(subject: Subject) -> list[Finding]:
    """Rows of a batch, and documents packed into one row, must not see each other: values and gradients."""
    model, length = subject.build(), subject.length
    tokens = subject.random_tokens(3, length)
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % subject.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
        alone = model(tokens[1:2])
    rows = [
        tensor.index_select(0, torch.tensor([1, 2], device=tensor.device)) for tensor in state_tensors(before.state)
    ]
    others = [
        tensor.index_select(0, torch.tensor([1, 2], device=tensor.device)) for tensor in state_tensors(after.state)
    ]
    return [
        at_most(
            "logits of rows beside a row that changed", difference(after.logits[1:], before.logits[1:]), SAME_SHAPES
        ),
        at_most("state of rows beside a row that changed", worst_difference(others, rows), SAME_SHAPES),
        at_least("logits of the row that changed", difference(after.logits[:1], before.logits[:1]), NOTICED),
        at_most("logits of a row alone", difference(alone.logits, before.logits[1:2]), OTHER_SHAPES),
        at_most("gradient that one row's loss sends into another row", _leak(model, tokens), 0.0),
        _documents(subject, model),
    ]


@torch.no_grad()
def _documents(subject: Subject, model: LanguageModel) -> Finding:
    figure = "logits of a packed document against the document alone"
    shared = subject.config.channel.in_context_settings
    if subject.config.writes_in_context and shared is not None and shared.lifetime == "stream":
        return does_not_apply(figure, "lifetime: stream carries the levels' fast copies over documents on purpose")
    start = -(-subject.length // (2 * subject.config.alignment)) * subject.config.alignment
    tokens = subject.random_tokens(2, start + subject.length)
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[:, 0] = resets[0, start] = True
    packed = model(tokens, resets=resets).logits
    return at_most(figure, difference(packed[:1, start:], model(tokens[:1, start:]).logits), OTHER_SHAPES)


def _leak(model: LanguageModel, tokens: Tensor) -> float:
    """Gradient of row 0's logits with respect to what the embedding gives to the other rows."""
    handed: list[Tensor] = []

    def hook(_module: torch.nn.Module, _given: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        handed.append(leaf)
        return leaf

    with model.embedding.register_forward_hook(hook):
        logits = model(tokens).logits
    gradients = torch.autograd.grad(logits[0].square().sum(), handed, allow_unused=True, materialize_grads=True)
    assert any(gradient[0].any() for gradient in gradients)
    return max(gradient[1:].abs().max().item() for gradient in gradients)


def _places(subject: Subject) -> list[int]:
    """Tokens beside borders, ascending; all inside a stream of `subject.length` tokens."""
    config = subject.config
    periods = {1, config.mixer.alignment, span(config), config.alignment}
    periods |= {writes.period_tokens for writes in config.channel.writes if writes is not None}
    wanted = {1, 3, 4, 5, subject.length // 2, subject.length - 1}
    wanted |= {period + shift for period in periods for shift in (-1, 0, 1)}
    return sorted(place for place in wanted if 0 < place < subject.length)


def _change(logits: Float[Tensor, "B T V"], row: int, where: slice) -> Tensor:
    return (logits[row, where] - logits[0, where]).abs().max()


def _in_calls(model: LanguageModel, tokens: Tensor, cuts: list[int]) -> tuple[Float[Tensor, "B T V"], StreamState]:
    """Read a stream in several calls."""
    state, logits = None, []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        output = model(tokens[:, begin:end], state=state)
        state = output.state
        logits.append(output.logits)
    assert state is not None
    return torch.cat(logits, dim=1), state


def _state_difference(found: StreamState, expected: StreamState) -> float:
    if found.position != expected.position:
        return float("inf")
    return worst_difference(state_tensors(found), state_tensors(expected))
