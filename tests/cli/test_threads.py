import subprocess
import sys

import pytest

from nested_lm.cli.threads import SHORT_SPIN, describe_waiting, spin_shortly


def test_threads_sleep_soon_unless_the_user_said_how_they_wait():
    environment = {"HOME": "/"}
    spin_shortly(environment)
    assert environment == {"HOME": "/"} | SHORT_SPIN
    assert describe_waiting(environment) == "GOMP_SPINCOUNT=1000, KMP_BLOCKTIME=1"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_said_stays(name):
    environment = {name: "mine"}
    spin_shortly(environment)
    assert environment == {name: "mine"}


def test_the_command_sets_it_before_torch_is_imported():
    code = (
        "import sys, os; import nested_lm.cli.main; "
        "assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=clean, check=True, capture_output=True).stdout == b"1000\n"
