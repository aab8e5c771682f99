"""Whether the weights of one model compute the same function in another."""

import json
import re
from collections.abc import Mapping
from typing import Any

from nested_lm.config.channels import ContinuumMemory
from nested_lm.config.load import identifying
from nested_lm.config.model import ModelConfig

# Clocks, chunks among them, and starting values: what a model computes before anything is written does not depend on
# them. And `backend`, which does the computing.
_FREE = re.compile(
    r"init_std|(.*\.)?(backend|chunk|chunk_generators|flat_gates|rate_init|momentum_init|decay_horizon_tokens)|channel\.(assignment|in_context|levels\[\d+\]\.(period_tokens|in_context))(\[|\.|$).*"
)


def architecture_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Name the fields that decide what weights compute and differ, as `model.width: 64 -> 128`.

    Clocks of levels may differ, and so may the levels to which whole layers are assigned.
    """
    ours, theirs = flat(here.model_dump(mode="json")), flat(there.model_dump(mode="json"))
    free = _FREE if isinstance(here.channel, ContinuumMemory) else re.compile(rf"{_FREE.pattern}|channel\.levels.*")
    absent = "(absent)"
    return [
        f"model.{path}: {theirs.get(path, absent)} -> {ours.get(path, absent)}"
        for path in sorted(set(theirs) | set(ours))
        if theirs.get(path, absent) != ours.get(path, absent) and not free.fullmatch(path)
    ]


def settings_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name the first few settings that differ between two models, without `backend`."""
    theirs, ours = flat(identifying(there)), flat(identifying(here))
    found = [
        f"{path} is {_shown(theirs, path)} there and {_shown(ours, path)} here"
        for path in dict.fromkeys([*theirs, *ours])
        if _shown(theirs, path) != _shown(ours, path)
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return json.dumps(leaves[path]) if path in leaves else "absent"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a configuration by dotted path, such as `channel.levels[0].period_tokens`."""
    if isinstance(value, dict):
        pairs = [(f"{path}.{key}" if path else str(key), child) for key, child in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for key, child in pairs for name, leaf in flat(child, key).items()}
