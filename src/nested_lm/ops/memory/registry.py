"""Names of what can compute the self-modifying memories. Imports nothing, so that configurations load without torch."""

BACKENDS = {
    "cpu": "nested_lm.ops.memory.cpu.backend",
    "triton": "nested_lm.ops.memory.triton.backend",
    "torch": "nested_lm.ops.memory.chunked",
}
"""Modules that are a `Backend` (ops/memory/backend.py), by the name that `model.mixer.backend` gives them.

`auto` takes the first that can run. torch stands last: it runs everywhere.
"""

FRONTS = {
    "cpu": "nested_lm.ops.memory.cpu.front",
}
"""Modules that are a `Front`: kernels of what stands before the memories. torch's form serves where none can run."""
