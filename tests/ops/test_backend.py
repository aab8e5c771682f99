"""Which code computes the memories: what `model.mixer.backend` asks for, and `auto` what the machine can do."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nested_lm.config.mixers import SelfModifying
from nested_lm.errors import ConfigError
from nested_lm.ops.memory import backend as memory_backend
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.state import MemoryCall
from tests.nn.test_model import HOPE, build, tokens
from tests.ops.memory_problems import Problem, make_rule

PAPER = {"momentum": "mean"}  # an option that the C lacks

needs_compiler = pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent")
    monkeypatch.setattr(cpu_library, "reason_missing", cpu_library.reason_missing.__wrapped__)


@pytest.fixture
def called(monkeypatch):
    """Names of the forms that models call."""
    names = []
    for module, name in ((memory_chunked, "torch"), (memory_cpu, "cpu")):

        def watched(*args, _original=module.self_modify, _name=name, **kwargs):
            names.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, "self_modify", watched)
    return names


def hope(backend, **settings):
    return build(HOPE | {"mixer": HOPE["mixer"] | {"backend": backend} | settings, "num_layers": 1})


def test_the_default_is_auto():
    assert SelfModifying(kind="self_modifying", num_heads=2).backend == "auto"


@needs_compiler
class TestWithACompiler:
    @pytest.mark.parametrize(("backend", "taken"), [("auto", "cpu"), ("cpu", "cpu"), ("torch", "torch")])
    def test_each_takes_what_it_says(self, backend, taken, called):
        hope(backend)(tokens(2, 9))
        assert called == [taken]

    def test_both_give_the_same_logits_state_and_gradients(self):
        found = []
        for backend in ("cpu", "torch"):
            model = hope(backend)
            output = model(tokens(2, 17))
            output.logits.square().mean().backward()
            memory = output.state.layers[0].memory
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            found.append((output.logits.detach(), [x.detach() for x in (*memory.border, *memory.current)], gradients))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)

    def test_auto_leaves_what_the_c_lacks_to_torch(self, called):
        hope("auto", **PAPER)(tokens(2, 9))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hope("auto").float()(tokens(2, 9))
        assert called == ["torch", "torch"]

    def test_asked_for_where_it_cannot_run_it_is_an_error_with_the_repair(self):
        repair = "set model.mixer.backend=auto, or torch"
        with pytest.raises(ConfigError, match=rf"backend is `cpu`, but it has .*; {repair}"):
            hope("cpu", **PAPER)(tokens(2, 9))
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ConfigError, match=rf"autocast is on.*; {repair}"),
        ):
            hope("cpu").float()(tokens(2, 9))

    def test_tensors_on_another_device_are_none_of_its_business(self):
        problem = Problem(make_rule(4), tokens=2)
        problem.leaves = {name: leaf.detach().to("meta") for name, leaf in problem.leaves.items()}
        inputs, start, *_ = problem.arguments()
        call = (problem.rule, inputs.key, start, MemoryCall())
        assert memory_backend.select("auto", *call) is memory_chunked
        with pytest.raises(ConfigError, match="the tensors are on `meta`"):
            memory_backend.select("cpu", *call)


class TestWithoutACompiler:
    def test_auto_takes_torch(self, no_compiler, called):
        hope("auto")(tokens(2, 9))
        assert called == ["torch"]

    def test_asked_for_it_is_an_error_with_the_repair(self, no_compiler):
        with pytest.raises(ConfigError, match=r"but \$CC is `/nonexistent`, .* use cc; set .*=auto, or torch"):
            hope("cpu")(tokens(2, 9))


def test_a_backend_is_one_file_and_one_line(tmp_path):
    """The example of docs/extending.md, as a user runs it: the module, and the line that makes it known."""
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = text.split("## A memory backend")[1].split("\n## ")[0]
    module, use = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_backend.py").write_text(module, encoding="utf-8")
    (tmp_path / "use.py").write_text(use, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = partial(subprocess.run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    done = run([sys.executable, str(tmp_path / "use.py")])
    assert done.returncode == 0, done.stderr
    assert "model.mixer.backend is `mine`, but it computes linear memories only" in done.stdout
