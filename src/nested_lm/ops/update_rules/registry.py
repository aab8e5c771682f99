"""All inner optimizers by name.

A new rule joins by adding a line to `RULES` (and, to be chosen in a preset, a section to `config/update_rules.py`).
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from nested_lm.ops.update_rules.base import UpdateRule
from nested_lm.ops.update_rules.deep import DeepMomentum
from nested_lm.ops.update_rules.momentum import Adam, DeltaMomentum, GradientDescent, Momentum, PreconditionedMomentum
from nested_lm.ops.update_rules.orthogonal import M3, Muon
from nested_lm.ops.update_rules.proximal import DeltaGradientDescent

RULES: Mapping[str, type[UpdateRule[Any]]] = MappingProxyType(
    {
        "gd": GradientDescent,
        "momentum": Momentum,
        "preconditioned_momentum": PreconditionedMomentum,
        "delta_momentum": DeltaMomentum,
        "dmgd": DeepMomentum,
        "adam": Adam,
        "muon": Muon,
        "m3": M3,
        "dgd": DeltaGradientDescent,
    }
)
"""Kind to rule."""


def make_rule(kind: str, settings: Mapping[str, float | int | str | bool | None]) -> UpdateRule[Any]:
    """Make a rule from its kind and settings, the fields of its class; those that are absent have its defaults.

    Raises:
        ValueError: an unknown kind or setting, or a value out of range.
    """
    if kind not in RULES:
        raise ValueError(f"there is no update rule {kind!r}; the kinds are {', '.join(RULES)}")
    allowed = tuple(field.name for field in fields(RULES[kind]))
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(
            f"update rule {kind} has no setting {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    return RULES[kind](**settings)
