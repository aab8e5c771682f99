"""Turns an ablation grid into runs, each proven to differ from the base in one factor and by 2 % of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from nested_lm.config.ablation import AblationConfig, Variant
from nested_lm.config.architecture import flat
from nested_lm.config.load import load_run
from nested_lm.config.run import RunConfig
from nested_lm.errors import ConfigError

BASE = "base"
PARAMETER_TOLERANCE = 0.02
"""As for rows of one table (`evaluation/results.py`)."""


@dataclass(frozen=True)
class Arm:
    """One configuration of a grid: the base (`variant` is None) or a variant of it.

    overrides: of the base preset: those all arms share, those of the arm it is compared with, its delta and balance.
    config: resolved with these overrides. parameters: of its model.
    """

    name: str
    variant: Variant | None
    overrides: tuple[str, ...]
    config: RunConfig
    parameters: int


def plan_arms(
    grid: AblationConfig, *, shared: Sequence[str] = (), only: Sequence[str] | None = None
) -> tuple[Arm, ...]:
    """Resolve the base and the variants of a grid.

    Args:
        grid: base and variants.
        shared: overrides of every arm.
        only: variants to take, in the grid's order; None: all. The base always comes first.

    Raises:
        ConfigError: a name in `only` that is unknown, or without the variant it is compared with; a delta that cannot
            be resolved, that changes nothing or more than the fields it names, or that leaves the size by more than
            2 %.
    """
    unknown = [name for name in only or () if name not in grid.chosen]
    if unknown:
        raise ConfigError(f"the grid has no variant {unknown[0]!r}; choose from {', '.join(grid.chosen)}")
    arms = {BASE: _make(BASE, None, tuple(shared), load_run(grid.base, shared))}
    for name, variant in grid.chosen.items():
        if only is not None and name not in only:
            continue
        reference = arms.get(variant.against or BASE)
        if reference is None:
            raise ConfigError(
                f"variant {name!r} is compared with {variant.against!r}; take that one into `only` as well"
            )
        overrides = (*reference.overrides, *variant.delta, *variant.balance)
        try:
            config = load_run(grid.base, overrides)
        except ConfigError as error:
            raise ConfigError(f"variant {name!r} of {grid.base}: {error}") from error
        arm = _make(name, variant, overrides, config)
        check_one_factor(reference, arm)
        check_size(reference, arm)
        arms[name] = arm
    return tuple(arms.values())


def changed_fields(base: RunConfig, other: RunConfig) -> tuple[str, ...]:
    """Dotted paths of the settings in which two runs differ, besides their name and folder."""
    ours, theirs = flat(other.model_dump(mode="json")), flat(base.model_dump(mode="json"))
    missing = object()
    paths = {path for path in {*ours, *theirs} if ours.get(path, missing) != theirs.get(path, missing)}
    return tuple(sorted(paths - {"name", "output_dir"}))


def check_one_factor(base: Arm, arm: Arm) -> None:
    """Refuse a variant that differs from the arm it is compared with in a setting it does not name, or in none.

    Raises ConfigError naming the settings.
    """
    assert arm.variant is not None
    widths = [_dotted(override.lstrip("+").partition("=")[0]) for override in arm.variant.balance]
    changed = changed_fields(base.config, arm.config)
    named = [path for path in changed if _is_below(path, arm.variant.fields)]
    rest = [path for path in changed if path not in named and not _is_below(path, widths)]
    if rest:
        raise ConfigError(
            f"variant {arm.name!r} changes {', '.join(rest)} besides {', '.join(arm.variant.fields)}: then a "
            "difference in the results has two possible causes; take that out of its delta, or name it in `fields` if "
            "it is the same factor"
        )
    if not named:
        raise ConfigError(
            f"variant {arm.name!r} changes none of {', '.join(arm.variant.fields)}: it is {base.name} again; correct "
            "its delta, or set the variant to null"
        )


def check_size(base: Arm, arm: Arm) -> None:
    """Refuse a variant that is not as large as the arm it is compared with, within 2 %. Raises ConfigError."""
    ours, theirs = arm.parameters, base.parameters
    if abs(ours - theirs) > PARAMETER_TOLERANCE * max(ours, theirs):
        raise ConfigError(
            f"variant {arm.name!r} has {ours:,} parameters, {base.name} {theirs:,}: {ours / theirs - 1:+.1%}, more "
            f"than {PARAMETER_TOLERANCE:.0%}; set a width in its `balance`, such as model.channel.levels.0.expansion"
        )


def _make(name: str, variant: Variant | None, overrides: tuple[str, ...], config: RunConfig) -> Arm:
    from nested_lm.nn.sizing import count_parameters  # imports torch

    return Arm(name, variant, overrides, config, count_parameters(config.model)["total"])


def _dotted(key: str) -> str:
    """`channel.levels.0.expansion` as `flat` writes it: `channel.levels[0].expansion`."""
    path = ""
    for part in key.split("."):
        path += f"[{part}]" if part.isdigit() else f".{part}" if path else part
    return path


def _is_below(path: str, fields: Sequence[str]) -> bool:
    return any(path == field or path.startswith((f"{field}.", f"{field}[")) for field in fields)
