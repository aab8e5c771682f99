"""Compiling a launch ahead of time: registers, spills, shared memory and occupancy, without a GPU."""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nested_lm.ops.memory.triton import tiles
from nested_lm.ops.memory.triton.launch import Launch

CACHE = Path.home() / ".cache" / "nested-lm" / "kernels"
NUMBERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""Shared memory that one program may have."""
REGISTERS, THREADS = 65_536, 2048
"""Of a multiprocessor, for all programs that run on it."""


class Resources(NamedTuple):
    """What one program of a kernel takes."""

    registers: int
    spilled: int
    """Bytes a thread stores to memory for want of registers."""
    shared: int
    """Bytes of shared memory."""
    warps: int

    def programs(self, capability: int) -> int:
        """How many run on a multiprocessor at once."""
        threads = 32 * self.warps
        room = SHARED_KIB[capability] * 1024 // max(self.shared, 1)
        return min(REGISTERS // (self.registers * threads), THREADS // threads, room)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list]]:
    """Types of a launch's arguments, its constants, and which pointers are aligned."""
    types, constants, attributes = {}, dict(launch.constants), {}
    names = launch.kernel.arg_names
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, torch.Tensor):
            types[name] = NUMBERS[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    return {name: types.get(name, "constexpr") for name in names}, constants, attributes


def identity(launch: Launch, capability: int) -> str:
    """What the compiled kernel depends on: its source, what it calls, its types, constants and the compiler."""
    types, constants, _ = signature(launch)
    sources = [inspect.getsource(inspect.getmodule(x)) for x in (launch.kernel.fn, tiles)]
    whole = [*sources, launch.kernel.__name__, str(types), str(constants), launch.warps, capability, triton.__version__]
    return hashlib.sha256(json.dumps([str(x) for x in whole]).encode()).hexdigest()


def compiled(launch: Launch, capability: int) -> Resources:
    """Resources of a kernel on GPUs of a compute capability; compiled once for each source."""
    stored = CACHE / f"{identity(launch, capability)}.json"
    if stored.exists():
        return Resources(**json.loads(stored.read_text()))
    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": 1}
    found = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _assembled(found.asm["ptx"], ARCHITECTURES[capability])
    resources = Resources(registers, spilled, found.metadata.shared, launch.warps)
    CACHE.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(resources._asdict()))
    return resources


def _assembled(ptx: str, architecture: str) -> tuple[int, int]:
    """Registers, and bytes spilled, as ptxas says."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        # The plain ptxas of the wheel is older than the PTX that it writes.
        command = [f"{triton.knobs.nvidia.ptxas.path}-blackwell", f"-arch={architecture}", "-v", file.name]
        said = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) registers", said)[0]), int(re.findall(r"(\d+) bytes spill stores", said)[0])
