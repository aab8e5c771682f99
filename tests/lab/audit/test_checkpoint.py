"""The model of a checkpoint is audited with its own weights."""

import pytest
import torch

from nested_lm.checkpoint import newest_checkpoint, read_tensors
from nested_lm.config.load import parse_run
from nested_lm.train.trainer import train
from nested_lm_lab.audit.runner import run_audit
from nested_lm_lab.audit.subject import open_subject
from tests.lab.audit.conftest import MODELS, STEP_TOKENS

CPU = torch.device("cpu")


@pytest.fixture
def trained(tmp_path, tiny_data, make_subject):
    run = make_subject("hope").run.model_dump(mode="json")
    run |= {"output_dir": str(tmp_path / "run"), "data": tiny_data.config.model_dump(mode="json")}
    run["model"] |= {"vocab_size": 320, **MODELS["hope"]}
    run["train"] |= {"budget_tokens": 2 * STEP_TOKENS}
    train(parse_run(run, "test"))
    return tmp_path / "run"


def test_run_folder_and_checkpoint_are_the_same_subject(trained):
    newest = newest_checkpoint(trained / "checkpoints")
    by_run, by_checkpoint = (open_subject(str(path), (), device=CPU) for path in (trained, newest))
    assert by_run.source == by_checkpoint.source == str(newest)
    assert (by_run.step, by_run.tokens) == (2, 2 * STEP_TOKENS)
    saved = read_tensors(newest, "model")
    built = by_run.build(dtype=torch.float32)
    assert all(torch.equal(saved[name], value) for name, value in built.state_dict().items())
    names = ("reference", "causality", "split", "gradients", "ablations", "clock_a", "long_stream", "seeds", "resume")
    audit = run_audit(by_run, names, report=lambda line: None)
    assert audit.passed, [row for row in audit.rows if row.state == "missed"]
    assert audit.identity.step == 2
