"""What a drill is, and how one trial runs in a process of its own."""

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nested_lm.errors import NestedLMError

KILLED, TRACEBACK = -signal.SIGKILL, 77


@dataclass
class Outcome:
    """What happened in a drill. failures: a sentence each. notes: figures that are no failures."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, holds: bool, sentence: str) -> None:
        """Count a failure, unless it holds."""
        if not holds:
            self.failures.append(sentence)


@dataclass(frozen=True)
class Drill:
    """One drill.

    promise: what must hold in every trial. full: trials of the nightly run. run: does that many in an empty folder.
    """

    name: str
    promise: str
    full: int
    run: Callable[[Path, int], Outcome]


def fork(action: Callable[[], object]) -> int:
    """Start an action in a child and return its process id; forked, so that nothing is imported again.

    The child exits with 0, with the exit code of an error of ours, or with `TRACEBACK`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            action()
    except NestedLMError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = TRACEBACK
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
