"""What the measurement of sharing writes can be published: it says code, machine, checkpoint and options."""

import json
from argparse import Namespace
from types import SimpleNamespace

import torch

from benchmarks import forking
from nested_lm.storage.commit import current_commit


def test_the_result_is_stamped():
    loaded = SimpleNamespace(
        identity={"name": "hope", "run_id": "hope-1", "parameters": 1000, "seed": 1},
        step=4,
        config=SimpleNamespace(train=SimpleNamespace(context_length=256)),
    )
    found = json.loads(json.dumps(forking.stamped(loaded, Namespace(limit=9, turns=2), {"boolq": {"documents": 9}})))
    assert found["commit"] == current_commit()
    assert found["date"]
    assert found["hardware"]["torch"] == torch.__version__
    assert found["hardware"]["threads"] == 1
    assert {"processor", "cores", "load_average", "python"} <= found["hardware"].keys()
    assert found["model"] == {"name": "hope", "run_id": "hope-1", "parameters": 1000, "step": 4}
    assert (found["max_length"], found["limit"], found["turns"]) == (256, 9, 2)
    assert found["tasks"] == {"boolq": {"documents": 9}}
