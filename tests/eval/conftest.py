import pytest

from nested_lm.eval.schema import CheckpointMark, ResultFile, RunIdentity, SamplingMetrics, TextSample


@pytest.fixture
def make_result():
    """Build a small result file; identity fields can be overridden."""

    def make(*, task_version="1", settings=None, metrics=None, **identity):
        fields = {
            "run_id": "r1",
            "name": "hope-demo",
            "arm": "self_modifying+cms",
            "config_hash": "c" * 16,
            "data_hash": "d" * 16,
            "tokenizer_hash": "t" * 16,
            "commit": "abc",
            "seed": 0,
            "parameters": 1000,
            "tokens": 4096,
            "step": 4,
            "context_length": 256,
        } | identity
        metrics = metrics or SamplingMetrics(
            kind="sampling",
            samples=(TextSample(prompt="We", text=" the people — ünd", tokens=3, ended=True, seed=0),),
            tokens_per_s=12.5,
        )
        return ResultFile(
            schema_version=1,
            task=metrics.kind,
            task_version=task_version,
            identity=RunIdentity(**fields),
            settings=settings or {"max_new_tokens": 3},
            checkpoint=CheckpointMark(name="step-00000004", digest="0" * 32),
            device="cpu",
            metrics=metrics,
            created="2026-01-02T03:04:05+00:00",
            wall_seconds=0.25,
        )

    return make
