"""The same architecture, smaller: what is audited in the place of a model too large for a minute on one core."""

from typing import Any

from nested_lm.config.model import ModelConfig

SMALL_PARAMETERS = 4_000_000
"""Models of up to this size are audited as they are."""

SMALL_SPAN = 128
"""So are models whose longest chunk, window or in-context period is up to this many tokens."""

WIDTH, LAYERS, VOCABULARY, HEADS, HEAD_WIDTH, SPAN = 64, 2, 512, 2, 16, 32
"""Largest sizes of a shrunk model; SPAN in tokens."""

_SPANS = ("chunk", "chunk_generators", "window", "segment")
"""Names of settings that are a number of tokens the mixer treats together."""


def span(config: ModelConfig) -> int:
    """Tokens after which a model has done everything it does: its longest chunk, window or in-context period."""
    written = [writes.period_tokens for writes in config.channel.writes if writes is not None]
    return max([1, config.mixer.alignment, *_values(config.mixer.model_dump(), _SPANS), *written])


def shrink(config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """Shrink width, layers, vocabulary, heads and chunks; the mechanisms stay.

    Returns:
        The smaller configuration, and each change as `field: from -> to`.
    """
    old = config.model_dump(mode="json")
    factor = -(-max([1, *_values(old["mixer"], _SPANS)]) // SPAN)
    width = min(config.width, WIDTH)
    new = dict(old)
    new["width"] = width
    new["vocab_size"] = min(config.vocab_size, VOCABULARY)
    new["mixer"] = _shrink_mixer(old["mixer"], factor)
    new["channel"], new["num_layers"] = _shrink_channel(old["channel"], config, share=width / config.width)
    changed = ModelConfig.model_validate(new)
    before, after = _flat(old), _flat(changed.model_dump(mode="json"))
    names = sorted(set(before) | set(after))
    return changed, tuple(
        f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)
    )


def _shrink_mixer(old: dict[str, Any], factor: int) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, value in old.items():
        if isinstance(value, dict):
            new[key] = _shrink_mixer(value, factor)
        elif key == "num_heads":
            new[key] = min(value, HEADS)
        elif key == "num_kv_heads" and value is not None:
            new[key] = 1 if value < old["num_heads"] else min(value, HEADS)
        elif key == "head_width" and value is not None:
            new[key] = min(value, HEAD_WIDTH)
        elif key in _SPANS and value is not None:
            new[key] = max(1, value // factor)
        else:
            new[key] = value
    if new.get("chunk_generators") is not None:  # the two chunk sizes nest, and go on doing so
        one, other = old["chunk"], old["chunk_generators"]
        shorter = max(1, min(one, other) // factor)
        longer = shorter * (max(one, other) // min(one, other))
        new["chunk"], new["chunk_generators"] = (longer, shorter) if one > other else (shorter, longer)
    return new


def _shrink_channel(old: dict[str, Any], config: ModelConfig, *, share: float) -> tuple[dict[str, Any], int]:
    new = dict(old)
    if "hidden" in new:  # an absolute width; `expansion` is relative
        new["hidden"] = max(1, round(new["hidden"] * share))
    layers = min(config.num_layers, LAYERS)
    if new["kind"] == "layer_levels":
        layers = max(layers, len(new["levels"]))
        if new["assignment"] is not None:  # the first layer of each level, in the order of the layers
            given = new["assignment"]
            kept = sorted({given.index(level) for level in set(given)})
            new["assignment"] = [given[layer] for layer in kept]
            layers = len(kept)
    written = sorted({writes.period_tokens for writes in config.channel.writes if writes is not None})
    if written and written[-1] > SMALL_SPAN:
        shorter = {period: 8 * 2**index for index, period in enumerate(written)}
        new["levels"] = [_with_period(level, shorter) for level in new["levels"]]
    return new, layers


def _with_period(level: dict[str, Any], shorter: dict[int, int]) -> dict[str, Any]:
    writes = level["in_context"]
    if writes is None:
        return level
    return level | {"in_context": writes | {"period_tokens": shorter[writes["period_tokens"]]}}


def _values(tree: Any, names: tuple[str, ...]) -> list[int]:
    """Integers under the given names, anywhere in a tree."""
    if not isinstance(tree, dict):
        return []
    own = [value for key, value in tree.items() if key in names and isinstance(value, int)]
    return own + [value for child in tree.values() for value in _values(child, names)]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        pairs = [(f"{path}.{key}" if path else key, value) for key, value in tree.items()]
    elif isinstance(tree, list):
        pairs = [(f"{path}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {path: tree}
    return {name: leaf for key, child in pairs for name, leaf in _flat(child, key).items()}
