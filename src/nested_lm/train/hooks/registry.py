"""Opens the hooks of a run. A new one is a file beside this one, and a line here."""

from typing import NamedTuple

from nested_lm.config.run import RunConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.train.hooks.base import Hook
from nested_lm.train.hooks.elastic import Elastic, ElasticPenalty
from nested_lm.train.hooks.milestones import Milestones
from nested_lm.train.hooks.nonfinite_watch import NonFiniteWatch
from nested_lm.train.hooks.probe import open_probe
from nested_lm.train.hooks.update_norms import UpdateNorms
from nested_lm.train.step import GradientComputer
from nested_lm.train.strategies.base import Strategy
from nested_lm.train.stream import TrainingStream


class Parts(NamedTuple):
    """What hooks are made of. scoring: runs the plain model."""

    config: RunConfig
    model: LanguageModel
    optimizer: ClockedOptimizer
    stream: TrainingStream
    strategy: Strategy
    scoring: GradientComputer


def open_hooks(parts: Parts) -> list[Hook]:
    """Make the hooks that a configuration asks for, in the order in which they are called.

    Raises:
        DataError: what a hook reads is not there.
    """
    train = parts.config.train
    norms = UpdateNorms(
        parts.optimizer,
        every_steps=train.logging.every_steps,
        step_tokens=train.step_tokens,
        total_steps=parts.stream.total_steps,
        memories=parts.model.memories,
        whole=parts.strategy.whole,
    )
    hooks: list[Hook] = [NonFiniteWatch(limit=train.max_nonfinite_steps), norms, Milestones(parts.stream)]
    if train.ewc is not None:
        penalty = ElasticPenalty(parts.optimizer.parameters, train.ewc)
        hooks.append(Elastic(penalty, parts.stream, parts.scoring, seed=parts.config.seed))
    if train.probe is not None:
        hooks.append(open_probe(parts.config, parts.stream.groups, parts.model, parts.scoring))
    return hooks
