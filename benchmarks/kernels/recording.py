"""The launches of a training call, on tensors without values."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryInputs, MemoryWeights, zero_state
from nested_lm.ops.memory.triton import backend
from nested_lm.ops.memory.triton.launch import Launch, listening


def launches(
    rule: WriteRule,
    *,
    width: int,
    hidden: int,
    low: bool,
    batch: int = 1,
    tokens: int = 200,
    heads: int = 2,
    resets: bool = True,
    backward: bool = True,
) -> list[Launch]:
    """What one call starts, forward and backward. low: bfloat16 operands."""
    found: list[Launch] = []
    memories = len(rule.adapt)
    hidden, outer = (width, 0) if rule.depth == 1 else (hidden, hidden)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, requires_grad=True)

    with FakeTensorMode(), listening(found.append):
        vectors = (empty(batch, tokens, heads, width) for _ in range(3))
        gates = (empty(batch, tokens, heads) for _ in range(2 + bool(rule.momentum)))
        start = MemoryWeights(empty(heads, memories, hidden, width), empty(heads, memories, width, outer))
        readouts = (empty(heads, width) if name in rule.adapt else None for name in ("eta", "alpha"))
        state = zero_state(start, batch, momentum=bool(rule.momentum))
        starts = torch.zeros(batch, tokens, dtype=torch.bool) if resets else None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = backend.self_modify(
                *(MemoryInputs(*vectors, *gates), start, GateReadout(*readouts), state),
                **{"rule": rule, "position": 0, "resets": starts},
            )
        if backward:
            output.reads.sum().backward()
    return found


def bytes_moved(launch: Launch) -> int:
    """Bytes a launch's programs read and write, if nothing stays in a cache: every tensor once where its parts belong
    to programs, and the start once a lane.

    An upper bound: tensors of a whole call count with the share of their pieces that the launch works on.
    """
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False))
    lanes, tokens, step = values["lanes"], values["T"], values["STEP"]
    pieces = -(-tokens // step)
    served = launch.grid[1] if launch.kernel.__name__.startswith("read") else (*launch.grid, 1)[2]
    total = 0
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or name in ("REACH", "LIMITS", "RESETS") or name.startswith("READOUT"):
            continue
        size = value.numel() * value.element_size()
        if name == "START":  # each program loads its own
            total += size * (lanes // value.shape[0]) * served
        elif name in ("WEIGHTS", "MOMENTA"):  # slots that are read, and one that is written
            slots = 3 if launch.constants.get("CARRY") else 1
            total += slots * served * size // value.shape[0]
        elif value.dim() >= 3 and tokens in value.shape[:3]:  # of the whole call
            total += size * served // pieces
        else:
            total += size * (2 if name.startswith("G_") else 1)
    return total
