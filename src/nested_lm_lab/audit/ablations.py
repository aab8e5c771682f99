"""Each mechanism can be switched off: the rows of table 6, as configurations next to the audited one."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from nested_lm.config.model import ModelConfig
from nested_lm.ops.memory.stability import ONE_BORDER
from nested_lm_lab.audit.finding import Finding, at_least, broken, does_not_apply
from nested_lm_lab.audit.probe import difference, next_token_loss
from nested_lm_lab.audit.shrink import span
from nested_lm_lab.audit.subject import Subject
from nested_lm_lab.audit.training import make_optimizer

DIFFERENT = 1e-6
"""Smallest change of logits that a mechanism must make, relative to the largest logit; float64."""


class Switch(NamedTuple):
    """A mechanism and how it is switched.

    change: edits the mixer's (or the model's) configuration, as plain values.
    beside: edits both sides first, where the switched mechanism is refused at the model's own settings.
    """

    name: str
    change: Callable[[dict[str, Any]], None]
    beside: Callable[[dict[str, Any]], None] | None = None


def ablations(subject: Subject) -> Iterator[Finding]:
    """Switch each mechanism off (or on, where this model has it off) and train a step: finite, and not the same."""
    plain = subject.config.model_dump(mode="json")
    tokens = subject.random_tokens(1, span(subject.config) + 13)
    with torch.no_grad():
        expected = subject.build()(tokens).logits
    for switch in (*_memory_switches(plain), *_channel_switches(subject, plain)):
        if isinstance(switch, Finding):
            yield switch
            continue
        document = subject.config.model_dump(mode="json")
        against = expected
        if switch.beside is not None:
            switch.beside(document)
            with torch.no_grad():
                against = subject.build(ModelConfig.model_validate(document))(tokens).logits
        switch.change(document)
        figure = f"change of logits, {switch.name}"
        try:
            config = ModelConfig.model_validate(document)
        except ValidationError as error:
            yield broken(figure, f"refused: {error.errors()[0]['msg']}")
            continue
        yield _try(subject, config, figure, tokens, against)


def _try(
    subject: Subject,
    config: ModelConfig,
    figure: str,
    tokens: torch.Tensor,
    expected: torch.Tensor,
) -> Finding:
    """Compare the logits of the changed model before a training step; they must be finite after it, too."""
    model = subject.build(config)
    with torch.no_grad():
        changed = difference(model(tokens).logits, expected)
    next_token_loss(model, tokens).backward()
    optimizer = make_optimizer(subject.run, model, tuple(1 for _ in config.channel.periods))
    optimizer.step(1, 1.0)
    with torch.no_grad():
        after = model(tokens).logits
    if not bool(torch.isfinite(after).all()):
        return broken(figure, "logits are not finite after one training step")
    return at_least(figure, changed, DIFFERENT)


def _memory_switches(plain: dict[str, Any]) -> Iterator[Switch | Finding]:
    """The rows of table 6 that concern the self-modifying memories."""
    path = _memory_path(plain)
    if path is None:
        yield does_not_apply("table 6, self-modifying memories", f"mixer {plain['mixer']['kind']} has none")
        return

    def of(document: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = document
        for key in path:
            found = found[key]
        return found

    settings = of(plain)
    for memory in ("k", "v", "q", "eta", "alpha"):
        if memory == "alpha" and settings["retention"] == "full":
            yield does_not_apply("change of logits, alpha memory", "retention is held at 1, so there is no gate for it")
            continue
        is_there = memory in settings["adapt"]

        def toggle(document: dict[str, Any], memory: str = memory, *, is_there: bool = is_there) -> None:
            adapt = [name for name in of(document)["adapt"] if name != memory]
            of(document)["adapt"] = adapt if is_there else [*adapt, memory]

        yield Switch(f"{memory} memory {'off' if is_there else 'on'}", toggle)
    has_erase = settings["erase"] != "none"

    def bounded_without_erase(document: dict[str, Any]) -> None:
        longest = max(settings["chunk"], settings["chunk_generators"] or 0)
        rates = {
            name: None if rate is None else min(rate, ONE_BORDER / longest) for name, rate in settings["rates"].items()
        }
        of(document).update(rates=rates)

    yield Switch(
        "DGD's erase term off" if has_erase else "DGD's erase term on",
        lambda document: of(document).update(erase="none" if has_erase else "both"),
        bounded_without_erase if has_erase else None,
    )
    if settings["gradient"] == "border":
        if settings["momentum"]:
            yield Switch("momentum off", lambda document: of(document).update(momentum=False))
        else:  # which the C lacks
            yield Switch("momentum on", lambda document: of(document).update(momentum="mean", backend="torch"))
    else:
        reason = f"gradient {settings['gradient']} is not known before the chunk, which momentum needs"
        yield does_not_apply("change of logits, momentum", reason)

    def keep_everything(document: dict[str, Any]) -> None:
        of(document)["adapt"] = [name for name in of(document)["adapt"] if name != "alpha"]
        of(document)["retention"] = "full"

    if settings["retention"] == "learned":
        yield Switch("retention off (held at 1)", keep_everything)
    else:
        yield Switch("retention on", lambda document: of(document).update(retention="learned"))


def _memory_path(plain: dict[str, Any]) -> tuple[str, ...] | None:
    """Where the settings of self-modifying memories are: the mixer's own, or those of the memory inside it."""
    if plain["mixer"]["kind"] == "self_modifying":
        return ("mixer",)
    if isinstance(plain["mixer"].get("memory"), dict):
        return ("mixer", "memory")
    return None


def _channel_switches(subject: Subject, plain: dict[str, Any]) -> Iterator[Switch | Finding]:
    """Without the Continuum Memory System: one MLP of about the same size, updated at every step."""
    channel = plain["channel"]
    if channel["kind"] != "cms" or len(channel["levels"]) == 1:
        yield does_not_apply("change of logits, one level instead of a chain", f"channel {channel['kind']} is no chain")
    else:
        expansion = sum(level["expansion"] for level in channel["levels"])

        def one_level(document: dict[str, Any]) -> None:
            first = document["channel"]["levels"][0] | {"expansion": expansion, "in_context": None}
            document["channel"] |= {"levels": [first], "wiring": "sequential", "in_context": None}

        yield Switch("one level instead of a chain", one_level)
    if not subject.config.writes_in_context:
        yield does_not_apply("change of logits, in-context writes off", "no level writes in context")
        return

    def no_writes(document: dict[str, Any]) -> None:
        document["channel"]["in_context"] = None
        for level in document["channel"]["levels"]:
            level["in_context"] = None

    yield Switch("in-context writes off", no_writes)
