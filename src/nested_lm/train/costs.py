"""What a run will cost, before it is started: operations per token, bytes of state and of training memory, hours.

Operations, state and activations are counted, not modelled: one block runs forward and backward on fake tensors, which
have shapes and no values, so that every mixer and option is counted as it is executed. Blocks of a model are alike.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nested_lm.config.model import ModelConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.train import TrainConfig
from nested_lm.errors import ConfigError
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.sizing import count_parameters
from nested_lm.train.strategy import micro_batches

DEVICE_FLOPS = {"h100": 989e12, "h200": 989e12, "a100": 312e12}
"""Dense bfloat16 operations a second that the makers state."""

DEFAULT_MFU = 0.3  # an assumption, not a measurement

_FLOAT32 = 4  # bytes of a weight, a gradient, a moment
_SHORTEST = 128  # tokens of the shortest probe


class Costs(NamedTuple):
    """Costs of one sequence of `tokens` tokens through the whole model.

    forward: multiply-adds of matrix products and attention, as two operations each, by part. Elementwise work is not
        counted. `projections` are the linear maps of the mixers, `memory` their writes, reads and other products.
    training: forward and backward, with what the hand-written backward of the memories computes again, without what
        `train.recompute` adds.
    state_bytes: of the state after the sequence, by part.
    block_bytes: what backward keeps of one block.
    head_bytes: what backward keeps of embedding, head and loss.
    """

    tokens: int
    forward: dict[str, float]
    training: float
    state_bytes: int
    block_bytes: float
    head_bytes: float


class _Probe(NamedTuple):
    tokens: int
    parts: dict[str, float]  # operations of one block by part, and of the head
    backward_block: float
    backward_head: float
    saved_block: float
    saved_head: float
    state_bytes: float


def count_costs(model: ModelConfig, tokens: int, *, bfloat16: bool, recompute_chunks: bool = False) -> Costs:
    """Count the costs of a sequence.

    All counts but those of attention over the whole context are affine in the number of tokens once the window is
    full, so that two short probes give them exactly where `tokens` is a multiple of the chunk.

    Raises:
        ConfigError: levels are written in context, whose costs depend on where their borders fall.
    """
    if model.writes_in_context:
        raise ConfigError(
            "costs of levels that are written in context (channel.in_context) are not counted; count without them"
        )

    def probe(length: int) -> _Probe:
        return _run_probe(model, length, bfloat16=bfloat16, recompute_chunks=recompute_chunks)

    step = _probe_tokens(model)
    found = probe(tokens) if step is None or 2 * step >= tokens else _extrapolate(probe(step), probe(2 * step), tokens)
    layers = model.num_layers
    forward = {part: count * (1 if part == "logits" else layers) for part, count in found.parts.items()}
    backward = layers * found.backward_block + found.backward_head
    return Costs(
        tokens,
        forward,
        sum(forward.values()) + backward,
        round(layers * found.state_bytes),
        found.saved_block,
        found.saved_head,
    )


def _probe_tokens(model: ModelConfig) -> int | None:
    """Tokens of the shorter of two probes; None where the cost of a token grows with the context."""
    mixer = model.mixer
    if mixer.kind == "attention" and mixer.window is None:
        return None
    spans = [value for name in ("window", "segment") if (value := getattr(mixer, name, None))]
    chunk = math.lcm(model.alignment, getattr(mixer, "chunk", 1))
    longest = max(_SHORTEST, chunk, *spans)
    return int(math.ceil(longest / chunk) * chunk)


def _extrapolate(short: _Probe, long: _Probe, tokens: int) -> _Probe:
    """Continue the straight line through both. A state that no longer grows does not."""
    distance = (tokens - short.tokens) / (long.tokens - short.tokens)

    def at(first: float, second: float) -> float:
        return first + (second - first) * distance

    parts = {part: at(count, long.parts[part]) for part, count in short.parts.items()}
    rest = [at(first, second) for first, second in zip(short[2:], long[2:], strict=True)]
    return _Probe(tokens, parts, *rest)


def _attention_operations(q: Any, k: Any, v: Any, *args: Any, **_: Any) -> int:
    """Both products of attention; a causal one needs half of them. Shapes (B, H, T, K), (B, G, S, K)."""
    causal = len(args) > 1 and bool(args[1])
    whole = int(2 * math.prod(q[:3]) * k[2] * (q[3] + v[3]))
    return whole // 2 if causal else whole


def _attention_backward_operations(_: Any, q: Any, k: Any, v: Any, *args: Any, **__: Any) -> int:
    """Four products for the two of the forward pass; the scores that are computed again are not counted."""
    causal = len(args) > 3 and bool(args[3])
    whole = int(4 * math.prod(q[:3]) * k[2] * (q[3] + v[3]))
    return whole // 2 if causal else whole


def _convolution_backward_operations(out: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:  # noqa: ARG001
    """Twice the forward pass; torch's own formula leaves out that channels are convolved separately."""
    return int(4 * math.prod(weight) * out[0] * math.prod(out[2:]))


def _counter() -> FlopCounterMode:
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.convolution_backward: _convolution_backward_operations,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
        },
    )


class _Saved:
    """Adds up the distinct storages that backward keeps, weights aside."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {id(parameter.untyped_storage()): parameter.untyped_storage() for parameter in model.parameters()}
        self.size = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self._known[id(storage)] = storage  # kept, so that no other one gets its id
            self.size += storage.nbytes()
        return tensor


def _run_probe(config: ModelConfig, tokens: int, *, bfloat16: bool, recompute_chunks: bool) -> _Probe:
    """Run one block, embedding, head and loss on one sequence of fake tokens."""
    config = config.model_copy(update={"num_layers": 1})
    with FakeTensorMode():
        model = LanguageModel(config, recompute="chunk" if recompute_chunks else "none")
        saved = _Saved(model)
        sizes: list[int] = []
        block: Any = model.blocks[0]
        block.register_forward_pre_hook(lambda *_: sizes.append(saved.size))
        block.register_forward_hook(lambda *_: sizes.append(saved.size))
        forward, backward = _counter(), _counter()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        keep: Callable[[Tensor], Tensor] = saved.pack
        with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                output = model(ids)
            loss = token_losses(output.logits, ids).sum()
        with backward:
            torch.autograd.backward(loss)
        in_block = sizes[1] - sizes[0]
        state_bytes = output.state.num_bytes()
        linear = [name for name, module in block.mixer.named_modules() if isinstance(module, nn.Linear)]
    counts = {name: sum(found.values()) for name, found in forward.flop_counts.items()}
    top = "LanguageModel.blocks.0"
    mixer = counts.get(f"{top}.mixer", 0)
    projections = sum(counts.get(f"{top}.mixer.{name}", 0) for name in linear)
    attention = sum(
        count for kind, count in forward.flop_counts[f"{top}.mixer"].items() if "scaled_dot_product" in str(kind)
    )
    parts: dict[str, float] = {
        "logits": counts["Global"] - counts[top],
        "projections": projections,
        "memory": mixer - projections - attention,
        "attention": attention,
        "channel": counts.get(f"{top}.channel", 0),
    }
    head_backward = 2 * parts["logits"]
    return _Probe(
        tokens,
        parts,
        backward.get_total_flops() - head_backward,
        head_backward,
        in_block,
        saved.size - in_block,
        state_bytes,
    )


def peak_bytes(config: RunConfig, costs: Costs, *, parameters: int, devices: int = 1) -> dict[str, float]:
    """Estimate the peak of training memory of one device, by part.

    Weights, gradients and moments are exact for AdamW (Muon keeps one moment of a matrix, so less). Activations are
    the tensors that backward keeps and the gradient of the logits; what operations need on the way, the allocator's
    fragments and blocks that FSDP2 gathers come on top. Fast weights are among the activations.
    """
    train, model = config.train, config.model
    rows = micro_batches(train, devices)[1] * (train.context_length // costs.tokens)
    cut = devices if train.strategy == "fsdp2" else 1
    blocks = model.num_layers * costs.block_bytes
    if train.recompute == "block":
        width = 2 if train.precision == "bfloat16" else _FLOAT32
        kept = costs.tokens * model.width * max(width, _FLOAT32)  # the residual stream stays float32
        blocks = model.num_layers * kept + costs.block_bytes
    logits = costs.tokens * model.vocab_size * _FLOAT32
    return {
        "weights": _FLOAT32 * parameters / cut,
        "gradients": _FLOAT32 * parameters / cut,
        "moments": 2 * _FLOAT32 * parameters / cut,
        "activations": rows * (blocks + costs.head_bytes + logits),
    }


def stages(train: TrainConfig) -> list[tuple[int, int]]:
    """Context length and tokens of every stage of a run."""
    ends = [*(stage.until_tokens for stage in train.curriculum), train.num_steps * train.step_tokens]
    return [(length, end - begin) for length, begin, end in zip(train.context_lengths, [0, *ends], ends, strict=False)]


def describe_costs(config: RunConfig, *, device: str, mfu: float, devices: int) -> list[tuple[str, str]]:
    """Say what each stage costs, as labelled lines.

    Raises:
        ConfigError: an unknown device, a utilisation outside (0, 1], or ranks that cannot share a step.
    """
    if device not in DEVICE_FLOPS:
        raise ConfigError(f"--device-name {device}: unknown; known are {', '.join(DEVICE_FLOPS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: must lie above 0 and be at most 1")
    if config.model.writes_in_context:
        return [("costs", "not counted: levels that are written in context cost what their borders make them")]
    train = config.train
    parameters = count_parameters(config.model)["total"]
    rows, hours = [], 0.0
    for length, tokens in stages(train):
        costs = count_costs(
            config.model,
            length,
            bfloat16=train.precision == "bfloat16",
            recompute_chunks=train.recompute == "chunk",
        )
        parts = ", ".join(f"{part} {count / length / 1e6:.4g}" for part, count in costs.forward.items())
        forward = sum(costs.forward.values()) / length
        needed = costs.training / length * tokens / (DEVICE_FLOPS[device] * mfu * devices) / 3600
        hours += needed
        peak = peak_bytes(config, costs, parameters=parameters, devices=devices)
        memory = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in peak.items())
        rows += [
            (f"at {length:,}", f"{tokens:,} tokens, {needed:,.3g} h"),
            ("  forward", f"{forward / 1e6:,.4g} MFLOP a token: {parts}"),
            ("  training", f"{costs.training / length / 1e6:,.4g} MFLOP a token, without train.recompute"),
            ("  state", f"{costs.state_bytes:,} bytes a sequence"),
            ("  peak", f"about {sum(peak.values()) / 1e9:.3g} GB a device (estimate): {memory}"),
        ]
    assumed = f"{devices} x {device}, {DEVICE_FLOPS[device] / 1e12:g} TFLOP/s, at an assumed MFU of {mfu:g}"
    return [*rows, ("time", f"{hours:,.3g} h on {assumed}; not measured")]
