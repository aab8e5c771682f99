"""Compiling the C of `ops/cpu` for this machine, once, and loading it.

The compiler is `$CC`, or `cc`. Libraries are kept in `$XDG_CACHE_HOME/nested-lm` (or `~/.cache`; or the temporary
folder where that cannot be written to), by a hash of source, compiler and processor, so that a home directory shared by
several machines holds one for each.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "c"

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

C_TYPES = {torch.float32: "float", torch.float64: "double"}
"""Number types there is a library for."""


def compiler() -> list[str] | None:
    """Command of the C compiler; None when there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


@functools.cache
def reason_missing() -> str | None:
    """Why the library cannot be used here; None when it can. Compiles it when that has not been done yet."""
    command = compiler()
    if command is None:
        return "no C compiler was found (looked for $CC, then cc); install one (apt-get install gcc) or name one in $CC"
    try:
        for dtype in C_TYPES:
            load(dtype)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).splitlines()
        line = next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")
        return f"`{shlex.join(command)}` could not build the C library: {line.strip()}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reason_missing_when_traced() -> str | None:
    """`reason_missing`, as a constant of what torch.compile traces."""
    return reason_missing()


def describe() -> str:
    """Say what computes the memories on this machine's processor, and why."""
    reason = reason_missing()
    return f"in C ({compiler_version()})" if reason is None else f"in torch: {reason}"


def compiler_version() -> str:
    """First line of what the compiler says of its version.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be asked.
    """
    return _version(compiler() or []).splitlines()[0].strip()


def _version(command: list[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library of one number type, compiled first where there is none yet.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, stored or loaded.
    """
    path = library_path(dtype)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        _compile(path, C_TYPES[dtype])
        return ctypes.CDLL(str(path))


def library_path(dtype: torch.dtype) -> Path:
    """Where the library of a number type is kept, whether it is there or not.

    Raises:
        OSError, subprocess.SubprocessError: there is no place for it, or the compiler does not say its version.
    """
    return cache_folder() / f"memory-{C_TYPES[dtype]}-{_fingerprint()}.so"


def cache_folder() -> Path:
    """Folder of the libraries, made where it is missing.

    Raises:
        OSError: neither the user's cache nor the temporary folder can be written to.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(home) if home else Path.home() / ".cache") / "nested-lm"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # a home that cannot be written to, or none at all
        pass
    folder = Path(tempfile.gettempdir()) / f"nested-lm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _fingerprint() -> str:
    command = compiler() or []
    digest = hashlib.sha256("\0".join((*FLAGS, *command, _version(command), _processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")]
    return "\n".join(sorted(set(named))) or f"{platform.machine()} {platform.processor()}"


def _compile(path: Path, c_type: str) -> None:
    """Compile beside the target and rename, so that processes that build at the same time do no harm."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    command = [*(compiler() or []), *FLAGS, f"-DREAL={c_type}", "-o", name, str(SOURCES / "memory.c"), "-lm"]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def point(call: ctypes.Structure, tensors: dict[str, torch.Tensor | None]) -> None:
    """Set pointers of a call's description; the tensors must outlive it."""
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())


def run(name: str, call: ctypes.Structure, dtype: torch.dtype, lanes: int) -> None:
    """Run a function of the library on lanes that know nothing of one another, over torch's number of threads.

    ctypes lets go of the interpreter meanwhile.
    """
    function = getattr(load(dtype), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

    def work(share: tuple[int, int]) -> int:
        status: int = function(ctypes.byref(call), *share)
        return status

    threads = max(1, min(torch.get_num_threads(), lanes))
    shares = [(lanes * thread // threads, lanes * (thread + 1) // threads) for thread in range(threads)]
    if threads == 1:
        failed = bool(work(shares[0]))
    else:
        with ThreadPoolExecutor(threads) as pool:  # waits for all of them, also when it is interrupted
            failed = any(list(pool.map(work, shares)))
    if failed:
        raise MemoryError(f"`{name}` of the C library found no room for its work space")
