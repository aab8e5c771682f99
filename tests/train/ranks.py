"""Runs trainings in one process or as one of several ranks; as a script it is a rank, as torchrun would start it.

A job is a dictionary: `config` of the run, `dtype`, `stop_after` a step (a signal reaches the last rank only), and
`poison` a step (the last rank's loss is not finite there).
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from nested_lm.config.load import parse_run
from nested_lm.data.shards import TokenDataset
from nested_lm.nn.model import LanguageModel
from nested_lm.train.recorder import Recorder
from nested_lm.train.run_folder import open_run_folder
from nested_lm.train.signals import StopRequest
from nested_lm.train.state import seed_everything
from nested_lm.train.step import GradientComputer
from nested_lm.train.strategies.base import Strategy
from nested_lm.train.strategies.fsdp import FullyShard
from nested_lm.train.stream import TrainingStream
from nested_lm.train.trainer import Trainer, TrainSummary, train


def run_job(job: dict, strategy: Strategy) -> TrainSummary:
    """Train as `train` does, in the job's dtype, with the faults it asks for."""
    config = parse_run(job["config"], "test")
    seed_everything(config.seed)
    dataset = TokenDataset.open(Path(config.data.output_dir), "train")
    model = LanguageModel(config.model, recompute=config.train.recompute)
    model.initialise(config.seed)
    model.to(getattr(torch, job["dtype"]))
    size = sum(parameter.numel() for parameter in model.parameters())
    stream = TrainingStream(config, dataset, rank=strategy.rank, world_size=strategy.world_size)
    opened = functools.partial(open_run_folder, config, dataset, resume="auto", device="cpu", parameters=size)
    trainer = Trainer(config, model, stream, dataset, strategy, open_folder=opened)
    stop = StopRequest()
    is_last = strategy.rank == strategy.world_size - 1
    event, losses = Recorder.event, GradientComputer.losses

    def signalled(self, name, progress, fields, *, note=None):
        event(self, name, progress, fields, note=note)
        if is_last and name in ("step", "nonfinite") and progress.step == job.get("stop_after"):
            stop.set("SIGTERM")

    def poisoned(self, batch):
        found, stats = losses(self, batch)
        is_due = is_last and trainer._state.progress.step + 1 == job.get("poison")
        return (found * torch.nan if is_due else found), stats

    Recorder.event, GradientComputer.losses = signalled, poisoned
    try:
        return trainer.run(stop, (), console=Console(quiet=True))
    finally:
        Recorder.event, GradientComputer.losses = event, losses


def main() -> None:
    """Run the jobs of a file; those without a dtype through `train` itself."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with FullyShard.launched(torch.device("cpu")) as strategy:
        for job in jobs:
            if "dtype" in job:
                run_job(job, strategy)
    os.environ["MASTER_PORT"] = sys.argv[2]  # the first one may not be free again yet
    for job in jobs:
        if "dtype" not in job:
            train(parse_run(job["config"], "test"), console=Console(quiet=True))


if __name__ == "__main__":
    main()
