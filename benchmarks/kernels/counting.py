"""Launches of a whole training micro-batch, counted on tensors without values."""

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nested_lm.config.load import load_run
from nested_lm.nn.loss import token_losses
from nested_lm.nn.model import LanguageModel
from nested_lm.ops.memory.triton.launch import listening

FREE = {
    *(
        "view",
        "_unsafe_view",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "alias",
    ),
    *("detach", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "empty", "new_empty"),
    *("empty_like", "empty_strided", "new_empty_strided", "unfold", "diagonal", "chunk", "unflatten", "narrow"),
}
"""Operators that start no kernel."""


class Operators(TorchDispatchMode):
    """Counts what would start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count, and run."""
        name = function._schema.name.split("::")[-1]
        if name not in FREE and not function._schema.name.startswith("prim"):
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def micro_batch(preset: str, rows: int, tokens: int, *changes: str) -> dict[str, int]:
    """Launches of forward and backward of a micro-batch under bfloat16 autocast: by torch, and of our kernels."""
    run = load_run(preset, list(changes))
    ours: Counter[str] = Counter()
    count = Operators()
    with FakeTensorMode(), listening(lambda launch: ours.update([launch.kernel.__name__])):
        model = LanguageModel(run.model, recompute=run.train.recompute)
        given = torch.zeros(rows, tokens, dtype=torch.long)
        with count, torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(given).logits
            token_losses(logits, given).sum().backward()
    return {"torch": count.count.total(), "kernels": ours.total(), "layers": run.model.num_layers}
