"""One optimizer step: gradients of all micro-batches, weighted by scored tokens, and whether they are finite.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested_lm.data.loader import IGNORED_TARGET, Batch, EvaluationBatch
from nested_lm.nn.model import LanguageModel, ModelOutput, token_losses
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.train.nonfinite import NonFinite, first_nonfinite_gradient, first_nonfinite_loss
from nested_lm.train.strategies.base import Strategy


class Gradients(NamedTuple):
    """Outcome of the backward passes of one step; the gradients themselves are in `.grad`, unclipped.

    Of all ranks together, but for `stats`.

    loss: nats per scored token over all micro-batches.
    norm: global gradient norm.
    scored_tokens: targets that count.
    stats: model statistics, mean over this rank's micro-batches, on the device.
    nonfinite: the first value that is not finite, None when the step may be taken.
    """

    loss: float
    norm: Tensor
    scored_tokens: int
    stats: dict[str, Tensor]
    nonfinite: NonFinite | None


class GradientComputer:
    """Runs a model forward and backward over the micro-batches of a step.

    model: called as `model(inputs, resets=...)`; compiled or not.
    parameters: of that model, by name.
    precision: `bfloat16` runs the forward pass under autocast.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], strategy: Strategy, *, precision: str
    ) -> None:
        self._model, self._parameters, self._strategy = model, parameters, strategy
        self._is_autocast = precision == "bfloat16"

    def run(self, batches: Sequence[Batch], *, after_backward: Callable[[], None] = lambda: None) -> Gradients:
        """Compute the gradients of the mean loss over the scored tokens of all micro-batches of all ranks.

        Ranks have different numbers of scored tokens, so that each divides its losses by the number of all, and
        gradients are summed.

        after_backward: may add to the gradients, which the norm then includes and the loss does not.
        """
        scored = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)
        total = int(self._strategy.reduce([scored], "sum")[0])
        assert total > 0, "a step without a scored token; the loader never packs one"
        sums: list[Tensor] = []
        stats: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            with self._strategy.accumulate(is_last=index == len(batches) - 1):
                losses, found = self.losses(batch)
                sums.append(losses.detach().sum())
                self._strategy.backward(losses.sum() / total)
            for name, value in found.items():
                stats[name] = stats[name] + value if name in stats else value
        after_backward()
        norm = self._strategy.gradient_norm(self._parameters.values())
        # The host waits for the device here: nothing may be updated before this is known.
        *loss_sums, norm_value = torch.stack([*sums, norm.to(sums[0].dtype)]).tolist()
        loss = self._strategy.reduce([sum(loss_sums)], "sum")[0] / total
        # Both numbers are those of all ranks, so that all skip a step or none.
        nonfinite = None if math.isfinite(loss) and math.isfinite(norm_value) else self._locate(batches)
        mean_stats = {name: value / len(batches) for name, value in stats.items()}
        return Gradients(loss, norm, total, mean_stats, nonfinite)

    def losses(self, batch: Batch | EvaluationBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B, T) of a micro-batch in nats, 0 where not scored, and the model's statistics."""
        output = self._output(batch)
        return token_losses(output.logits, batch.targets.to(self._strategy.device)), output.stats

    def logits(self, batch: Batch) -> Tensor:
        """Predictions (B, T, V) of a micro-batch, with a graph."""
        return self._output(batch).logits

    def _output(self, batch: Batch | EvaluationBatch) -> ModelOutput:
        device = self._strategy.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._is_autocast):
            # Document starts stay on the host, where the model checks them.
            output: ModelOutput = self._model(batch.inputs.to(device), resets=batch.resets)
        return output

    def explain(self, model: LanguageModel, batches: Sequence[Batch]) -> str | None:
        """Say where in the forward passes of a step a value first is not finite; None: nowhere.

        model: the one that is trained, not its compiled form.
        """
        device = self._strategy.device
        for index, batch in enumerate(batches):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._is_autocast):
                found = locate_nonfinite(model, batch.inputs.to(device), resets=batch.resets)
            if found is not None:
                return f"micro-batch {index}, {found}"
        return None

    @torch.no_grad()
    def _locate(self, batches: Sequence[Batch]) -> NonFinite:
        """Name the first value that is not finite; the forward passes are run again to find its token."""
        for index, batch in enumerate(batches):
            mine = first_nonfinite_loss(self.losses(batch)[0], micro_batch=index)
            for rank, found in enumerate(self._strategy.share(mine)):
                if found is not None and found.row is not None:
                    return replace(found, row=found.row + rank * len(batch.inputs))  # of the batch of all ranks
        return first_nonfinite_gradient(self._parameters, self._strategy) or NonFinite("gradient norm")
