"""Runs one block forward and backward on fake tensors, which have shapes and no values, and counts what it takes.

Every mixer and option is counted as it is executed. Shapes: B batch, T tokens, V vocabulary.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel, token_losses

Recompute = Literal["none", "chunk", "block"]
"""What `train.recompute` may be."""

PARTS = ("logits", "projections", "memory", "attention", "channel")
"""Parts of the operations. The names mean what `Costs.forward` says."""


class Counts(NamedTuple):
    """What one block, embedding, head and loss take. Operations are those of all rows together.

    parts: operations of the forward pass, by part.
    backward_block, backward_head: operations of the backward pass.
    state: bytes of the block's state after the sequence.
    kept: bytes that the block keeps until its backward pass, whatever holds them.
    head: most bytes at once, beside those, while head and loss run forward and backward.
    block: most bytes at once, beside those, while the block runs forward and backward.
    """

    parts: dict[str, float]
    backward_block: float
    backward_head: float
    state: float
    kept: float
    head: float
    block: float


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the tensors that exist, weights aside, and remembers the most at once, phase by phase.

    Counts what lives, not what autograd says it saved, because a hand-written backward may keep what it likes.

    model: its parameters are not counted, nor are gradients that it has already.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        weights = [tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""

    def enter(self, phase: str) -> None:
        """Count peaks for another phase from now on."""
        self._phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        del types
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._see, result)
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def run_probe(
    config: ModelConfig, rows: int, tokens: int, *, bfloat16: bool, recompute: Recompute = "none", backward: bool = True
) -> Counts:
    """Run one block, embedding, head and loss on `rows` sequences of fake tokens.

    backward: whether to run the backward pass and count operations; without it only `state` and `kept` mean something.
    """
    config = config.model_copy(update={"num_layers": 1})
    with FakeTensorMode():
        model = LanguageModel(config, recompute=recompute)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # of earlier micro-batches
        live = LiveBytes(model)
        sizes: list[int] = []
        block: Any = model.blocks[0]

        def before(_: nn.Module, given: Any) -> None:
            sizes.append(live.now)
            live.enter("block")
            given[0].register_hook(lambda _: live.enter("embedding"))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            sizes.append(live.now)
            live.enter("head")
            output[0].register_hook(lambda _: live.enter("block"))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
        forward, backwards = _counter(), _counter()
        with live:
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            with forward if backward else nullcontext():  # counting operations takes as long as running them
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                    output = model(ids)
                state = output.state.num_bytes()
                loss = token_losses(output.logits, ids).sum()
                del output
            if backward:
                with backwards:
                    torch.autograd.backward(loss)
        linear = [name for name, module in block.mixer.named_modules() if isinstance(module, nn.Linear)]
    parts = _by_part(forward, linear) if backward else dict.fromkeys(PARTS, 0.0)
    head_backward = 2 * parts["logits"]
    return Counts(
        parts,
        backwards.get_total_flops() - head_backward,
        head_backward,
        state,
        sizes[1] - sizes[0],
        live.peaks["head"] - sizes[1],
        max(0, live.peaks["block"] - sizes[1]),
    )


def _by_part(counter: FlopCounterMode, linear: list[str]) -> dict[str, float]:
    counts = {name: sum(found.values()) for name, found in counter.flop_counts.items()}
    top = "LanguageModel.blocks.0"
    mixer = counts.get(f"{top}.mixer", 0)
    projections = sum(counts.get(f"{top}.mixer.{name}", 0) for name in linear)
    attention = sum(
        count for kind, count in counter.flop_counts[f"{top}.mixer"].items() if "scaled_dot_product" in str(kind)
    )
    found = (
        counts["Global"] - counts[top],
        projections,
        mixer - projections - attention,
        attention,
        counts.get(f"{top}.channel", 0),
    )
    return dict(zip(PARTS, map(float, found), strict=True))


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
    mapping: dict[Any, Callable[..., int]] = {
        aten.convolution_backward: _convolution_backward_operations,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
