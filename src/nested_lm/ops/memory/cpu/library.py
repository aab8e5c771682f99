"""Compiling the C of `ops/cpu` for this machine, once, and loading it.

The compiler is `$CC`, or `cc`. Libraries are kept in `$XDG_CACHE_HOME/nested-lm` (or `~/.cache/nested-lm`), by a hash
of source, compiler and processor, so that a home directory shared by several machines holds one for each.

What is loaded is run. So a folder is used only where nobody else can put files, and else a folder of the temporary
folder, or a fresh one for this process. The digest of each library stands beside it, and one that does not match, or
that is not the user's own file, is built again.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "c"

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

C_TYPES = {torch.float32: "float", torch.float64: "double"}
"""Number types there is a library for."""


FUNCTIONS = ("forward", "backward", "saved_numbers", "front", "front_backward")
"""What the library exports."""

TIMEOUT = 600
"""Seconds a compiler may take."""


def compiler() -> list[str] | None:
    """Command of the C compiler; None when there is none."""
    try:
        command = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:  # a quotation mark without its other half
        return None
    return command if command and shutil.which(command[0]) else None


@functools.cache
def reason_missing() -> str | None:
    """Why the library cannot be used here; None when it can. Compiles it when that has not been done yet."""
    command = compiler()
    if command is None:
        if os.environ.get("CC"):
            return (
                f"$CC is `{os.environ['CC']}`, which is no command here; name a C compiler in it, or unset it to use cc"
            )
        return "no C compiler was found: there is no `cc`; install one (apt-get install gcc) or name one in $CC"
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
    lines = _run([*(compiler() or []), "--version"]).splitlines()
    return lines[0].strip() if lines else "of no known version"


def _run(command: list[str]) -> str:
    """What a command prints. Raises what is said of `compiler_version`, with the command's errors as text."""
    done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    printed, errors = (part.decode(errors="replace") for part in (done.stdout, done.stderr))
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, printed, errors)
    return printed


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library of one number type, compiled first where there is none yet.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, stored or loaded.
    """
    path = library_path(dtype)
    if not _is_intact(path):
        _compile(path, C_TYPES[dtype])
    library = ctypes.CDLL(str(path))
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise OSError(f"what it built lacks {', '.join(missing)}")
    return library


def library_path(dtype: torch.dtype) -> Path:
    """Where the library of a number type is kept, whether it is there or not.

    Raises:
        OSError, subprocess.SubprocessError: there is no place for it, or the compiler does not say its version.
    """
    return cache_folder() / f"memory-{C_TYPES[dtype]}-{_fingerprint()}.so"


def cache_folder() -> Path:
    """Folder of the libraries, made where it is missing: the user's cache, or one that is private.

    Raises:
        OSError: there is no place that can be written to.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(OSError, RuntimeError):  # a home that cannot be written to, or none at all
        folder = (Path(home) if home else Path.home() / ".cache") / "nested-lm"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if _is_private(folder):
            return folder
    folder = Path(tempfile.gettempdir()) / f"nested-lm-{os.getuid()}"
    return folder if _is_private(folder) else _folder_of_this_process()


def _is_private(folder: Path) -> bool:
    """Whether the user alone can change what a folder holds. Makes it where it is missing.

    Refused are symbolic links, folders of other users, those that others may write to, and those on a way that another
    user can lead elsewhere.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    own = folder.lstat()
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.getuid() or own.st_mode & 0o022:
        return False
    for parent in {*folder.absolute().parents, *folder.resolve().parents}:
        mode = parent.stat().st_mode
        open_to_all = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
        if open_to_all or not {parent.stat().st_uid, parent.lstat().st_uid} <= {0, os.getuid()}:
            return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def _folder_of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nested-lm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_intact(path: Path) -> bool:
    """Whether a library is there, is the user's own file, and has the digest that was written beside it."""
    try:
        own = path.lstat()
        if not stat.S_ISREG(own.st_mode) or own.st_uid != os.getuid() or own.st_mode & 0o022:
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == _digest_of(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return False


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _fingerprint() -> str:
    command = compiler() or []
    digest = hashlib.sha256("\0".join((*FLAGS, *command, _run([*command, "--version"]), _processor())).encode())
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
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        _run([*(compiler() or []), *FLAGS, f"-DREAL={c_type}", "-o", str(built), str(SOURCES / "memory.c"), "-lm"])
        built.chmod(0o700)
        _digest_of(built).write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n", encoding="ascii")
        for part in (built, _digest_of(built)):
            part.replace(path.parent / part.name)


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
