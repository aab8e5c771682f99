"""What a run will cost, before it is started: operations per token, bytes of state and of activations, hours.

Blocks of a model are alike, so that one is probed (`cost_probe`) and multiplied. `footprint` makes a device's memory
of what is counted here.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, get_args

from nested_lm.config.model import ModelConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.train import TrainConfig
from nested_lm.errors import ConfigError
from nested_lm.nn.sizing import count_parameters
from nested_lm.train.costs.probe import Counts, Recompute, run_probe

DEVICE_FLOPS = {"h100": 989e12, "h200": 989e12, "a100": 312e12}
"""Dense bfloat16 operations a second that the makers state."""

DEFAULT_MFU = 0.3  # an assumption, not a measurement

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)

_CHUNK = 64  # tokens that divide the work of mixers without a chunk of their own


class Line(NamedTuple):
    """Bytes of a micro-batch: `fixed`, and `row` for each of its sequences."""

    fixed: float
    row: float

    def at(self, rows: int) -> float:
        """Bytes of this many sequences."""
        return self.fixed + self.row * rows


class Costs(NamedTuple):
    """Costs of one sequence of `tokens` tokens through the whole model.

    forward: multiply-adds of matrix products and attention, as two operations each, by part. Elementwise work is not
        counted. `projections` are the linear maps of the mixers, `memory` their writes, reads and other products.
    training: forward and backward, without what `train.recompute` adds.
    state_bytes: of the state after the sequence.
    kept: what one block keeps until its backward pass, for every way to recompute.
    head_work: what embedding, head and loss need at most beside what the blocks keep.
    block_work: what a block needs at most beside what it keeps.
    """

    tokens: int
    forward: dict[str, float]
    training: float
    state_bytes: int
    kept: dict[Recompute, Line]
    head_work: Line
    block_work: Line


def count_costs(model: ModelConfig, tokens: int, *, bfloat16: bool) -> Costs:
    """Count the costs of a sequence.

    All counts but those of attention over the whole context are affine in the number of tokens once the window is
    full, so that two short probes give them, exactly where `tokens` is a multiple of the chunk. The work space is
    not quite on a line, and the larger of line and probes is taken.

    Raises:
        ConfigError: levels are written in context, whose costs depend on where their borders fall.
    """
    if model.writes_in_context:
        raise ConfigError(
            "costs of levels that are written in context (channel.in_context) are not counted; count without them"
        )
    lengths = _probe_lengths(model, tokens)
    first, last = lengths[0], lengths[-1]
    short, long = (_probe(model, length, bfloat16, "none") for length in (first, last))
    distance = (tokens - first) / (last - first) if last > first else 0.0

    def at(begin: float, end: float) -> float:
        return begin + (end - begin) * distance

    layers, state = model.num_layers, at(short.state, long.state)
    forward = {
        part: at(count, long.parts[part]) * (1 if part == "logits" else layers) for part, count in short.parts.items()
    }
    backward = layers * at(short.backward_block, long.backward_block) + at(short.backward_head, long.backward_head)

    def kept(recompute: Recompute) -> Line:
        """A sequence has its state and a share for each token; the rest is casts of weights, which are there once."""
        begin, end = (_probe(model, length, bfloat16, recompute).kept for length in (first, last))
        each = (end - begin) / (last - first) if last > first else (begin - state) / tokens
        fixed = max(0.0, begin - short.state - each * first)
        return Line(fixed, at(begin, end) - fixed)

    space = max(short.block, long.block, at(short.block, long.block))
    return Costs(
        tokens,
        forward,
        sum(forward.values()) + backward,
        round(layers * state),
        {recompute: kept(recompute) for recompute in RECOMPUTE},
        _head_work(model, tokens, bfloat16),
        Line(0.0, space),
    )


def _probe_lengths(model: ModelConfig, tokens: int) -> tuple[int, ...]:
    """Lengths of one or two probes. One is as long as the sequence where the cost of a token grows with the context."""
    mixer = model.mixer
    if mixer.kind == "attention" and mixer.window is None:
        return (tokens,)
    span = getattr(mixer, "segment", None)
    if span is not None:  # segments do the same each
        return (span, 2 * span) if 2 * span < tokens else (tokens,)
    memory = getattr(mixer, "memory", mixer)
    chunk = math.lcm(model.alignment, getattr(memory, "chunk", _CHUNK))
    window = getattr(mixer, "window", None)
    if window:  # is computed in blocks of this many tokens
        span = math.ceil(window / chunk) * chunk
        return (span, 2 * span) if 2 * span < tokens else (tokens,)
    return (2 * chunk, 3 * chunk) if 3 * chunk < tokens else (tokens,)  # a first chunk may be special


@cache
def _probe(model: ModelConfig, tokens: int, bfloat16: bool, recompute: Recompute) -> Counts:
    """Recomputing changes what is kept after the forward pass; everything else is counted without it."""
    if recompute == "chunk" and not _has_memories(model):
        recompute = "none"
    return run_probe(model, 1, tokens, bfloat16=bfloat16, recompute=recompute, backward=recompute == "none")


def _has_memories(model: ModelConfig) -> bool:
    """Whether the mixer has chunks that can be computed again."""
    return model.mixer.kind == "self_modifying" or hasattr(model.mixer, "memory")


@cache
def _head_work(model: ModelConfig, tokens: int, bfloat16: bool) -> Line:
    """Probe head and loss at full length, behind the cheapest block there is."""
    plain = model.model_dump(include={"vocab_size", "width", "tie_embeddings"}) | {
        "num_layers": 1,
        "mixer": {"kind": "attention", "num_heads": 1, "window": None},
        "channel": {"kind": "swiglu", "expansion": 1.0},
    }
    config = ModelConfig.model_validate(plain)
    one, two = (run_probe(config, rows, tokens, bfloat16=bfloat16).head for rows in (1, 2))
    return Line(max(0.0, 2 * one - two), two - one if two > one else one)


def stages(train: TrainConfig) -> list[tuple[int, int]]:
    """Context length and tokens of every stage of a run."""
    ends = [*(stage.until_tokens for stage in train.curriculum), train.num_steps * train.step_tokens]
    return [(length, end - begin) for length, begin, end in zip(train.context_lengths, [0, *ends], ends, strict=False)]


def stage_costs(config: RunConfig) -> list[Costs]:
    """Count a sequence of every stage."""
    bfloat16 = config.train.precision == "bfloat16"
    return [count_costs(config.model, length, bfloat16=bfloat16) for length, _ in stages(config.train)]


def training_hours(config: RunConfig, costs: Sequence[Costs], *, device: str, mfu: float, devices: int) -> list[float]:
    """Hours of every stage at an assumed utilisation: arithmetic, not a measurement."""
    speed = DEVICE_FLOPS[device] * mfu * devices * 3600
    return [
        each.training / length * tokens / speed
        for each, (length, tokens) in zip(costs, stages(config.train), strict=True)
    ]


def rule_of_thumb(config: RunConfig) -> float:
    """Operations of a run by 6 x parameters x tokens, which knows neither embeddings nor memories nor attention."""
    return 6.0 * count_parameters(config.model)["total"] * config.train.num_steps * config.train.step_tokens


def _duration(hours: float) -> str:
    return f"{hours:,.3g} h" if hours >= 0.1 else f"{hours * 3600:.2g} s"


def describe_costs(config: RunConfig, *, device: str | None, mfu: float, devices: int) -> list[tuple[str, str]]:
    """Say what each stage costs and what a device holds, as labelled lines.

    device: whose memory and hours are stated; None: neither is known of this machine, and both are left out.

    Raises:
        ConfigError: an unknown device, a utilisation outside (0, 1], or ranks that cannot share a step.
    """
    from nested_lm.train.costs.footprint import describe_memory, held_bytes

    if device is not None and device not in DEVICE_FLOPS:
        raise ConfigError(f"--device-name {device}: unknown; known are {', '.join(DEVICE_FLOPS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: must lie above 0 and be at most 1")
    train = config.train
    if config.model.writes_in_context:
        held = held_bytes(config.model, train.optimizer, train.step_tokens)
        return [
            ("costs", "not counted: levels that are written in context cost what their borders make them"),
            (
                "memory",
                f"weights {held.weights / 1e9:.3g} GB, optimizer {held.optimizer / 1e9:.3g} GB; rest not counted",
            ),
        ]
    costs = stage_costs(config)
    hours = [] if device is None else training_hours(config, costs, device=device, mfu=mfu, devices=devices)
    takes = [f", {_duration(each)}" for each in hours] or [""] * len(costs)
    rows = []
    for each, needed, (length, tokens) in zip(costs, takes, stages(train), strict=True):
        parts = ", ".join(f"{part} {count / length / 1e6:.4g}" for part, count in each.forward.items() if count)
        forward = sum(each.forward.values()) / length
        rows += [
            (f"at {length:,}", f"{tokens:,} tokens{needed}"),
            ("  forward", f"{forward / 1e6:,.4g} MFLOP a token: {parts}"),
            ("  training", f"{each.training / length / 1e6:,.4g} MFLOP a token, without what train.recompute adds"),
            ("  state", f"{each.state_bytes:,} bytes a sequence"),
        ]
    rows += describe_memory(config, costs, device=device, devices=devices)
    counted = sum(each.training / length * tokens for each, (length, tokens) in zip(costs, stages(train), strict=True))
    rows.append(("operations", f"{counted:.3g} in all; 6 x parameters x tokens would be {rule_of_thumb(config):.3g}"))
    if device is None:
        return [*rows, ("time", "not known of this machine; --device-name h100 states that of an H100")]
    assumed = f"{devices} x {device}, {DEVICE_FLOPS[device] / 1e12:g} TFLOP/s, at an assumed MFU of {mfu:g}"
    return [*rows, ("time", f"{_duration(sum(hours))} on {assumed}; not measured")]
