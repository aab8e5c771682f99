"""Which write rules are stable, and why: what happens to one key that is written again and again.

Keys are unit vectors, so along one key a linear memory is a scalar d (its distance from the start, times the key), and
so is a layer of a two-layer memory along its own input. A write of rate r multiplies it by a coefficient, and repeated
writes stay bounded when the coefficient lies in [-1, 1]. The worst case is a rate at its largest, a retention of 1 and,
where a memory is taught its own answer, a value opposite to the key. C is the number of tokens of a chunk.

    what a chunk of C writes does to d                      coefficient              largest rate
    gradient at the border, no erase                        1 - C r                  2 / C
    the same, taught its own answer: error 2 d              1 - 2 C r                1 / C
    gradient at the border, erase since the start           2 (1 - r)^C - 1          1
    the same, taught its own answer                         3 (1 - r)^C - 2          1 - 3^(-1/C)
    gradient at the border, erase since the border          (1 - r)^C                2
    the same, taught its own answer                         2 (1 - r)^C - 1          1
    gradient at the fresh weights, no erase                 1 - r                    2
    the same, taught its own answer                         1 - 2 r                  1
    gradient at the fresh weights and erase                 1 - 2 r                  1
    the same, taught its own answer                         1 - 3 r                  2 / 3

Between two borders erasing multiplies d by (1 - r) a token, while the gradient, which only knows the border's d_b,
takes off r d_b a token: d = (1 - r)^C d_b - (1 - (1 - r)^C) d_b = (2 (1 - r)^C - 1) d_b. The others follow alike.
Two-layer memories are held to the same limits by damping (`state.damping`), which makes the gradient's share at most
what `room_beside_erase` leaves. Every row is measured in tests/ops/test_write_bounds.py, on both sides of its limit.

Source: spec of the bounds in docs/equations.md; measurements in reports/stability_journal.md.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nested_lm.ops.memory.rule import WriteRule

ONE_BORDER = 2.0
"""Largest product of rate and chunk at which writes without the erase term are stable."""

INPUT_ALONE = 6.4
"""The same when only the first of two layers erases and the target is the memory's own answer: the largest product that
was measured to be bounded (docs/footguns.md)."""


def overshooting(rule: "WriteRule") -> tuple[tuple[bool, str], ...]:
    """Reasons why a rule is never used, each with whether it holds: a single write overshoots, whatever the chunk."""
    exact = rule.depth == 1 and (rule.gradient != "border" or rule.alignment == 1)
    doubled = exact and rule.objective == "l2" and rule.erase != "none"
    above = [rate for rate, since in zip(rule.limits, rule.since_border, strict=True) if doubled and not since]
    limit = 1.0 if above and max(above) > 1.0 else 2.0
    useful = min([limit, *_limits_of_own_answers(rule).values()])
    grows = not rule.unit_values and any(rule.generated_targets) and not rule.normalise
    return (
        (
            max(rule.limits) > limit,
            f"rates {rule.limits}: above {limit:g} a single write overshoots"
            + (" (gradient and erase term both take the old content off)" if limit == 1.0 else "")
            + f"; use rates up to {useful:.4g}"
            + (f" (up to {limit:g} where the targets are values)" if useful < limit else "")
            + (", or erase_since: border" if limit == 1.0 and rule.gradient == "border" else ""),
        ),
        (
            not rule.erase_after_decay and rule.erase != "none" and max(rule.limits) > 1.0,
            f"erase_after_decay false with rates {rule.limits}: eq. 88's alpha I - eta k k^T has the eigenvalue "
            "alpha - eta, below -1 for a rate near 2 and any decay; use erase_after_decay: true, or rates up to 1",
        ),
        (
            grows,
            "values of any length with targets the memories generate feed back on themselves and diverge at every "
            "useful rate; use unit_values: true, or targets: values, or normalise: true",
        ),
    )


def unbounded(rule: "WriteRule") -> str | None:
    """Say which memory grows without bound when one key is written again and again; None when none does."""
    return _growing_undamped(rule) or _growing_momentum(rule) or _growing_answers(rule) or _growing_borders(rule)


def _growing_undamped(rule: "WriteRule") -> str | None:
    """Growth of two-layer memories once training has made their second layer steep."""
    if rule.damp or rule.depth == 1:
        return None
    return (
        "damp false with two-layer memories: training makes their second layers steep, and an undamped write then "
        "overshoots at every useful rate; use damp: true, or depth: 1"
    )


def _growing_momentum(rule: "WriteRule") -> str | None:
    """Growth through a running sum whose gradients are of a border some tokens ago.

    For linear memories without erase and long chunks it begins where the share that is kept passes about
    1 - rate x chunk / 2, for short ones later, and the share is learned. Two-layer memories without erase, as in
    Titans, are held by damping: they stay finite (docs/footguns.md has the figures).
    """
    held = rule.objective == "dot" or rule.alignment == 1 or (rule.depth == 2 and rule.erase == "none")
    if rule.momentum != "sum" or held:
        return None
    return (
        f"momentum sum with erase {rule.erase}, depth {rule.depth} and chunks of several tokens: the share of the "
        "sum that is kept is learned, and near 1 it grows at every rate; use momentum: mean"
    )


def _growing_answers(rule: "WriteRule") -> str | None:
    """Growth of linear memories whose targets are their own answers, M(v) to a value opposite to the key."""
    limits = _limits_of_own_answers(rule)
    for name, rate in zip(rule.adapt, rule.limits, strict=True):
        if rate > limits.get(name, math.inf):
            return (
                f"depth 1, objective {rule.objective}, gradient {rule.gradient} and erase {rule.erase} with rate "
                f"{rate:g} of {name}, whose target is its own answer: writes of a value opposite to the key make "
                f"what it holds grow; use rates up to {limits[name]:.4g}, or targets: values (and "
                "targets_generators)"
            )
    return None


def _limits_of_own_answers(rule: "WriteRule") -> dict[str, float]:
    """Largest stable rate of each linear memory that is taught its own answers, by name."""
    if rule.depth == 2:
        return {}
    memories = zip(rule.adapt, rule.chunks, rule.generated_targets, rule.since_border, strict=True)
    return {
        name: _limit_of_own_answers(rule, chunk, since_border=since_border)
        for name, chunk, generated, since_border in memories
        if generated
    }


def _limit_of_own_answers(rule: "WriteRule", chunk: int, *, since_border: bool) -> float:
    """Largest rate at which a linear memory that is taught its own answers is stable: the table above.

    With the inner product of eq. 92 a write adds M(v) to M(k): without the erase term it grows at every rate.
    """
    erases = rule.erase != "none"
    if rule.objective == "dot":
        return 1.0 if erases else 0.0
    if rule.gradient != "border":
        return 2 / 3 if erases else 1.0
    if not erases:
        return 1 / chunk
    return 1.0 if since_border else 1 - 3 ** (-1 / chunk)


def _growing_borders(rule: "WriteRule") -> str | None:
    """Growth because all writes of a chunk take the same error off: the coefficient 1 - C r falls below -1.

    Without the erase term, or without it in the second layer where it takes off what was written since the border only.
    Damping does not help, it holds each write of the chunk by itself. The share of a mean may change from token to
    token: when a chunk at share 0 is followed by one at share 1, linear memories are stable up to half of that, while
    damping holds two-layer ones.
    """
    if rule.objective != "l2" or rule.gradient != "border" or rule.erase == "both":
        return None
    most = ONE_BORDER / 2 if rule.momentum and rule.depth == 1 else ONE_BORDER
    memories = zip(rule.adapt, rule.limits, rule.chunks, rule.generated_targets, rule.since_border, strict=True)
    for name, rate, chunk, generated, since_border in memories:
        if rule.erase == "input" and not since_border:
            if rule.depth == 2 and generated and chunk * rate > INPUT_ALONE:
                return (
                    f"erase input with rate {rate:g} and chunk {chunk} of {name}, whose target is its own answer: "
                    f"its second layer erases nothing and grows; use rates up to {INPUT_ALONE / chunk:g}, "
                    "targets: values, or erase: both"
                )
            continue
        if chunk * rate > most:
            return (
                f"erase {rule.erase} with rate {rate:g} and chunk {chunk} of {name}: {chunk} writes of one key at "
                f"one border turn what it held into 1 - {chunk * rate:g} times that, and grow without bound; use "
                f"rates up to {most / chunk:g}, chunks of up to {int(most / rate)}, or erase: both"
            )
    return None
