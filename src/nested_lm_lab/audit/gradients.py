"""Outer gradients through the writes, held against finite differences.

All in float64. A stream is read in two calls: what the first call writes reaches the loss of the second through the
carried state and in no other way. Shapes: B batch, T tokens, H heads, M memories.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState, iterate_tensors
from nested_lm_lab.audit.finding import Finding, at_least, at_most, broken, does_not_apply
from nested_lm_lab.audit.memories import NO_MEMORY
from nested_lm_lab.audit.probe import TINY, next_token_loss, recorded, state_tensors
from nested_lm_lab.audit.shrink import span
from nested_lm_lab.audit.subject import Subject

STEPS = (1e-6, 1e-7, 1e-5)
"""Of a finite difference, relative to the parameter. Where one is too long for the curvature or too short for the
rounding, the next is tried and the best counts: a wrong derivative is wrong at every step.
"""

DERIVATIVE = 1e-5
"""Of a derivative against its finite difference: the difference's own error, with room for steep places."""

REACHED = 1e-9
"""Smallest gradient norm that counts as reaching, relative to the largest among what is compared."""


def gradients(subject: Subject) -> list[Finding]:
    """Every parameter gets a gradient; it is the derivative; and it reaches every start through the writes."""
    config, findings = _differentiable(subject)
    model = subject.build(config)
    cut = span(subject.config) + 3  # the first call passes a border of everything, and what is written there
    tokens = subject.random_tokens(1, cut + 10)
    head, tail = tokens[:, :cut], tokens[:, cut:]
    findings += _every_parameter(model, tokens)
    groups = list(_groups(model))
    findings.append(_total(model, groups, tokens))
    findings += _through_state(model, groups, head, tail)
    findings += _reached(subject, model, head, tail)
    return findings


def _differentiable(subject: Subject) -> tuple[ModelConfig, list[Finding]]:
    """The audited configuration, or the one next to it whose gradient is meant to be the derivative."""
    config = subject.config
    shared = config.channel.in_context_settings
    if not config.writes_in_context or shared is None or shared.meta_gradient == "second_order":
        return config, []
    document = config.model_dump(mode="json")
    figure = "derivative of first-order in-context writes"
    exact = config.mixer.is_twice_differentiable or config.num_layers == 1
    if exact:
        document["channel"]["in_context"]["meta_gradient"] = "second_order"
        how = "audited with second_order instead"
    else:
        document["channel"]["in_context"] = None
        for level in document["channel"]["levels"]:
            level["in_context"] = None
        how = "audited with levels that do not write in context, since this backend can be differentiated only once"
    reason = f"first_order takes the levels' writes for constants on purpose; {how}"
    return ModelConfig.model_validate(document), [does_not_apply(figure, reason)]


def _every_parameter(model: LanguageModel, tokens: Tensor) -> list[Finding]:
    """Norm of the smallest gradient of any parameter, and that all are finite."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(next_token_loss(model, tokens), list(named.values()), allow_unused=True)
    norms = {
        name: float("nan") if gradient is None else gradient.norm().item()
        for name, gradient in zip(named, found, strict=True)
    }
    missing = [name for name, norm in norms.items() if norm != norm]
    if missing:
        return [broken("smallest gradient of any parameter", f"no finite gradient: {', '.join(missing[:4])}")]
    name = min(norms, key=lambda key: norms[key])
    return [at_least("smallest gradient of any parameter", _share(norms[name], max(norms.values())), REACHED, name)]


def _total(model: LanguageModel, groups: Sequence["_Group"], tokens: Tensor) -> Finding:
    """Derivative of the loss of one stream along each group of parameters."""

    def loss() -> Tensor:
        return next_token_loss(model, tokens)

    named = dict(model.named_parameters())
    found = dict(zip(named, _grad(loss(), named), strict=True))
    errors = {group.label: _error(group, found, named, loss) for group in groups}
    return _worst("gradient of the loss against its finite difference", errors)


def _through_state(model: LanguageModel, groups: Sequence["_Group"], head: Tensor, tail: Tensor) -> Iterator[Finding]:
    """Derivative of the second call's loss with respect to the parameters of the first call only."""
    figure = "gradient through the writes against its finite difference"
    state = model(head).state
    carried = [tensor for tensor in state_tensors(state) if tensor.requires_grad]
    if not carried:
        yield broken(figure, "the state of the first call carries no gradient")
        return
    leaf = _leaf_state(state)
    of_state = torch.autograd.grad(
        next_token_loss(model, tail, leaf), _differentiable_leaves(leaf), allow_unused=True, materialize_grads=True
    )
    named = dict(model.named_parameters())
    pulled = torch.autograd.grad(
        carried, list(named.values()), list(of_state), allow_unused=True, materialize_grads=True
    )
    found = dict(zip(named, pulled, strict=True))
    fixed = {name: parameter.detach().clone() for name, parameter in named.items()}

    def loss() -> Tensor:
        before = model(head).state
        moved = {name: parameter.detach().clone() for name, parameter in named.items()}
        _set(named, fixed)
        value = next_token_loss(model, tail, before)
        _set(named, moved)
        return value

    touched = [group for group in groups if any(group.part(found[name]).any() for name in group.names)]
    if not touched:
        yield broken(figure, "no parameter of the first call gets a gradient from the second")
        return
    yield _worst(figure, {group.label: _error(group, found, named, loss) for group in touched})
    silent = [group for group in groups if group not in touched]
    moved = {group.label: _moves(group, named, loss) for group in silent}
    yield at_most(
        "loss moved through the writes by parameters without a gradient", max(moved.values(), default=0.0), 0.0
    )


def _reached(subject: Subject, model: LanguageModel, head: Tensor, tail: Tensor) -> Iterator[Finding]:
    """Gradient of the second call's loss for each start, projection and convolution, by way of the memories alone."""
    with recorded() as calls:
        state = model(head).state
    memories = [tensor for call in calls for tensor in iterate_tensors(call.output.state) if tensor.requires_grad]
    if not calls:
        yield does_not_apply(
            "starts, projections and convolution through the writes", f"{NO_MEMORY}: {subject.config.mixer.kind}"
        )
        return
    loss = next_token_loss(model, tail, state)
    named = dict(model.named_parameters())
    total = dict(zip(named, _grad(loss, named), strict=True))
    if not memories:
        yield broken("smallest gradient of a start, by way of the writes", "written memories carry no gradient")
        return
    of_memories = torch.autograd.grad(loss, memories, retain_graph=True, allow_unused=True, materialize_grads=True)
    pulled = torch.autograd.grad(
        memories, list(named.values()), list(of_memories), allow_unused=True, materialize_grads=True
    )
    written = dict(zip(named, pulled, strict=True))
    starts: dict[str, float] = {}
    for name in named:
        module, _, kind = name.rpartition(".")
        if kind in ("start_inner", "start_outer") and "mixer" in module:
            adapt = model.get_submodule(module).rule.adapt
            norms = written[name].flatten(2).norm(dim=-1)  # (H, M)
            starts |= {f"{name}, {memory}": norms[:, index].min().item() for index, memory in enumerate(adapt)}
    if starts:
        worst = min(starts, key=lambda key: starts[key])
        yield at_least(
            "smallest gradient of a head's start, by way of the writes",
            _share(starts[worst], max(starts.values())),
            REACHED,
            worst,
        )
    slow = {
        name: value
        for name, value in written.items()
        if re.search(r"mixer\.(\w+\.)*(conv|qkv)\.weight$", name) and ".attention." not in name
    }
    share = {name: _share(value.norm().item(), total[name].norm().item()) for name, value in slow.items()}
    if share:
        worst = min(share, key=lambda key: share[key])
        yield at_least(
            "smallest gradient of a projection or convolution, by way of the writes", share[worst], REACHED, worst
        )
    queries = [
        gradient[: len(gradient) // 3].norm().item()
        for name, gradient in total.items()
        if name.endswith("mixer.qkv.weight")
    ]
    if queries:
        yield at_least(
            "gradient of the query projection, relative to the largest", _share(min(queries), max(queries)), REACHED
        )


def _grad(loss: Tensor, named: Mapping[str, nn.Parameter]) -> tuple[Tensor, ...]:
    """Gradients of every parameter, zero where there is none; the graph stays."""
    return torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)


def _share(part: float, whole: float) -> float:
    """Quotient; 0 where both are 0."""
    return part / whole if whole else 0.0


class _Group:
    """Parameters of the same kind in all layers, or a third of them where one matrix makes q, k and v."""

    def __init__(self, label: str, names: Sequence[str], third: int | None = None) -> None:
        self.label, self.names, self.third = label, tuple(names), third

    def part(self, tensor: Tensor) -> Tensor:
        """Rows of a tensor that belong to the group."""
        if self.third is None:
            return tensor
        size = len(tensor) // 3
        return tensor[self.third * size : (self.third + 1) * size]


def _groups(model: LanguageModel) -> Iterator[_Group]:
    """Every parameter in one group."""
    names: dict[str, list[str]] = {}
    for name in dict(model.named_parameters()):
        names.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for label, members in names.items():
        if label.endswith("mixer.qkv.weight") and all(len(shapes[name]) % 3 == 0 for name in members):
            for third, letter in enumerate("qkv"):
                yield _Group(f"{label} ({letter})", members, third)
        else:
            yield _Group(label, members)


def _error(
    group: _Group, gradient: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]
) -> float:
    """Difference between a directional derivative and its central difference, relative to the larger.

    The direction is half along the gradient, half random: the derivative is then far from zero, and a path that the
    gradient leaves out still shows.
    """
    directions = _direction(group, gradient, named)
    expected = sum((gradient[name] * directions[name]).sum().item() for name in group.names)
    best = float("inf")
    for step in STEPS:
        difference = _difference(directions, named, loss, step)
        error = abs(difference - expected) / max(abs(difference), abs(expected), TINY)
        best = error if error != error else min(best, error)
        if not best > DERIVATIVE / 10:
            break
    return best


def _moves(group: _Group, named: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]) -> float:
    """Finite difference along a random direction."""
    return abs(_difference(_direction(group, None, named), named, loss, STEPS[0]))


def _direction(
    group: _Group, gradient: Mapping[str, Tensor] | None, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    directions = {}
    for name in group.names:
        parameter = named[name]
        size = group.part(parameter.detach()).norm().clamp_min(1e-3)
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        mixed = _unit(group, drawn) + (0 if gradient is None else _unit(group, gradient[name]))
        directions[name] = mixed * size
    return directions


def _unit(group: _Group, tensor: Tensor) -> Tensor:
    """The group's part of a tensor at length 1, zero elsewhere."""
    kept = torch.zeros_like(tensor)
    part = group.part(tensor)
    group.part(kept).copy_(part / part.norm().clamp_min(TINY))
    return kept


@torch.no_grad()
def _difference(
    directions: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], loss: Callable[[], Tensor], step: float
) -> float:
    values = []
    before = {name: named[name].clone() for name in directions}
    for sign in (1, -1):
        for name, direction in directions.items():
            named[name].copy_(before[name] + sign * step * direction)
        values.append(loss().item())
    for name, value in before.items():
        named[name].copy_(value)
    return (values[0] - values[1]) / (2 * step)


@torch.no_grad()
def _set(named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])


def _worst(figure: str, errors: Mapping[str, float]) -> Finding:
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return at_most(figure, errors[worst], DERIVATIVE, f"worst: {worst}, of {len(errors)} kinds of parameters")


def _leaf_state(state: StreamState) -> StreamState:
    """The same values, cut from the graph, with gradients of their own."""

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        return copy.requires_grad_() if tensor.requires_grad else copy

    return state.map(leaf)


def _differentiable_leaves(state: StreamState) -> list[Tensor]:
    return [tensor for tensor in state_tensors(state) if tensor.requires_grad]
