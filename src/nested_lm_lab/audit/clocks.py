"""Levels change on their clocks only, by the sum of their tokens' gradients.

Clock A belongs to the optimizer, clock B to the in-context writer. Shapes: B batch, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nested_lm.config.model import ModelConfig
from nested_lm.nn.channels.in_context import InContextState
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.state import StreamState, iterate_tensors
from nested_lm_lab.audit.finding import Finding, at_least, at_most, does_not_apply
from nested_lm_lab.audit.probe import difference, next_token_loss
from nested_lm_lab.audit.subject import Subject
from nested_lm_lab.audit.training import level_ratios, make_optimizer

SUM = 1e-12
"""Of a sum of gradients, relative, float64: the same numbers added in the same order, or nearly."""

WRITE = 1e-9
"""Of an in-context write against gradients of other passes over the same tokens, relative, float64."""


def clock_a(subject: Subject) -> Iterator[Finding]:
    """Train some steps with the run's optimizer: when each level moves, and on which gradient."""
    ratios = level_ratios(subject.run)
    if not ratios:
        yield does_not_apply("levels on clock A", f"channel {subject.config.channel.kind} has no levels")
        return
    model = subject.build()
    named, roles = dict(model.named_parameters()), model.parameter_roles()
    levels = {name: roles[name].level for name in named if roles[name].level is not None}
    optimizer = make_optimizer(subject.run, model, ratios)
    owners = {id(parameter): name for name, parameter in named.items()}
    given: dict[str, Tensor] = {}

    def watch(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in owners:
                    given[owners[id(parameter)]] = parameter.grad.detach().clone()

    early, still, sums, own = 0, 0, [], {name: torch.zeros_like(named[name]) for name in levels}
    handle = register_optimizer_step_pre_hook(watch)
    try:
        for step in range(1, 2 * max(ratios) + 1):
            next_token_loss(model, subject.random_tokens(1, subject.length, seed=step)).backward()
            for name in levels:
                own[name] += named[name].grad
            before = {name: named[name].detach().clone() for name in levels}
            given.clear()
            optimizer.step(step, 0.1)
            for name, level in levels.items():
                moved = not torch.equal(before[name], named[name])
                is_due = step % ratios[level] == 0
                early += moved and not is_due
                still += is_due and not moved
                if is_due:
                    sums.append(difference(given[name], own[name]) if name in given else float("inf"))
                    own[name].zero_()
    finally:
        handle.remove()
    periods = f"periods of {', '.join(map(str, ratios))} steps"
    yield at_most(f"changes of a level between its updates, {periods}", early, 0)
    yield at_most(f"updates at which a level did not change, {periods}", still, 0)
    yield at_most("gradient of an update against the sum over its period", max(sums), SUM)


def clock_b(subject: Subject) -> Iterator[Finding]:
    """Read a stream token by token: when each level's fast copy moves, and by which gradient."""
    config = subject.config
    if not config.writes_in_context:
        yield does_not_apply("levels on clock B", "no level of this model writes in context")
        return
    model = subject.build()
    writer = model.writer
    assert writer is not None
    periods = [level.ratio * writer.period for level in writer.levels]
    tokens = subject.random_tokens(1, 2 * max(periods) + 2)
    state, early, still = None, 0, 0
    before: list[list[Tensor]] | None = None
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            state = model(tokens[:, t : t + 1], state=state).state
            after = [iterate_tensors(level.distance) for level in _levels(state)]
            for index, period in enumerate(periods):
                # The first token after a period is the target of its last prediction, so the write comes with it.
                is_due = t > 0 and t % period == 0
                moved = before is not None and not all(map(torch.equal, before[index], after[index]))
                restarted = config.channel.restarts_levels and any(t % slower == 0 for slower in periods[index + 1 :])
                early += moved and not is_due
                still += is_due and not moved and not restarted
            before = after
    yield at_most(f"changes of a fast copy between its borders, periods of {periods} tokens", early, 0)
    yield at_most("borders at which a fast copy did not change", still, 0)
    for index, level in enumerate(writer.levels):
        yield at_most(
            f"first write of level {level.level} against its rate times the sum of {periods[index]} gradients",
            _first_write(subject, level.level, periods[index], writer.period),
            WRITE,
        )
    yield at_least("change of logits after the first write", _effect(subject, writer.period), 1e-12)


def _first_write(subject: Subject, level: int, period: int, segment: int) -> float:
    """Write one level by plain descent with the others at rest; compare with gradients of the learned weights."""
    alone = subject.config.model_dump(mode="json")
    for index, entry in enumerate(alone["channel"]["levels"]):
        if entry["in_context"] is not None:
            entry["in_context"]["rule"] = {"kind": "gd"}
            if index != level:
                entry["in_context"]["rate"] = 0.0
    alone["channel"]["wiring"] = "sequential" if "wiring" in alone["channel"] else None
    if alone["channel"]["wiring"] is None:
        del alone["channel"]["wiring"]
    rate = alone["channel"]["levels"][level]["in_context"]["rate"]
    model = subject.build(ModelConfig.model_validate(alone))
    tokens = subject.random_tokens(1, period + 1)
    with torch.no_grad():
        state = model(tokens).state
    writer = model.writer
    assert writer is not None
    place = next(index for index, written in enumerate(writer.levels) if written.level == level)
    found = iterate_tensors(_levels(state)[place].distance)
    expected = [-rate * gradient[None] for gradient in _sum_of_gradients(subject, alone, level, tokens, segment)]
    scale = max(tensor.abs().max() for tensor in expected)
    return max(((a - b).abs().max() / scale).item() for a, b in zip(found, expected, strict=True))


def _sum_of_gradients(
    subject: Subject, alone: dict[str, Any], level: int, tokens: Tensor, segment: int
) -> list[Tensor]:
    """Gradients of a model without writes for a level's weights, over segments whose past is a constant."""
    plain = alone | {"channel": alone["channel"] | {"in_context": None}}
    plain["channel"]["levels"] = [entry | {"in_context": None} for entry in alone["channel"]["levels"]]
    model: LanguageModel = subject.build(ModelConfig.model_validate(plain))
    weights = []
    for block in model.blocks:
        mlps = block.channel.level_mlps()
        if level in mlps:
            weights += [weight for name, weight in mlps[level].named_parameters() if weight.ndim == 2]
    total = [torch.zeros_like(weight) for weight in weights]
    state: StreamState | None = None
    for begin in range(0, tokens.shape[1] - 1, segment):
        output = model(tokens[:, begin : begin + segment], state=state)
        state = output.state.detach()
        loss = token_losses(output.logits, tokens[:, begin + 1 : begin + segment + 1]).sum()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sum_ += gradient
    return total


@torch.no_grad()
def _effect(subject: Subject, segment: int) -> float:
    """Whether outputs use the write from its border on: against the same model with its levels at rest."""
    plain = subject.config.model_dump(mode="json")
    plain["channel"]["in_context"] = None
    for entry in plain["channel"]["levels"]:
        entry["in_context"] = None
    tokens = subject.random_tokens(1, segment + 2)
    written = subject.build()(tokens).logits
    unwritten = subject.build(ModelConfig.model_validate(plain))(tokens).logits
    assert difference(written[:, :segment], unwritten[:, :segment]) < SUM, "outputs differ before the first border"
    return difference(written[:, segment:], unwritten[:, segment:])


def _levels(state: StreamState) -> tuple[Any, ...]:
    memory = state.in_context
    assert isinstance(memory, InContextState)
    return memory.levels
