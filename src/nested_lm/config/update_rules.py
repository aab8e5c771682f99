"""Inner optimizers that a preset can choose: which rule, and its settings. The rate stands beside it.

Used in training for the matrices (`train.optimizer`) and in context for the fast copies of a level (`channel.levels`).
Fields and defaults are those of the classes in `ops/update_rules/registry.py:RULES`, whose docstrings explain them;
a test keeps them equal.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from nested_lm.config.section import Count, Fraction, NonNegativeFloat, PositiveFloat, Section

Keep = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share that is kept, below 1."""

Iterations = Annotated[int, Field(ge=1, le=20)]
"""Steps of Newton-Schulz; 5 are the custom, more bring nothing."""


class RuleSection(Section):
    """Base of all rules."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `ops/update_rules/registry.py:make_rule` takes beside the kind."""
        return self.model_dump(exclude={"kind"})


class GradientDescent(RuleSection):
    """Step by the rate times the gradient (eq. 1)."""

    kind: Literal["gd"]


class Momentum(RuleSection):
    """Heavy-ball momentum (eqs. 33-34)."""

    kind: Literal["momentum"]
    inertia: Fraction = 0.9  # share of the running sum that is kept a step


class PreconditionedMomentum(RuleSection):
    """Momentum of gradients divided by the root mean square of past ones (eqs. 46-47)."""

    kind: Literal["preconditioned_momentum"]
    inertia: Fraction = 0.9  # share of the running sum that is kept a step
    square_keep: Keep = 0.99  # share of the squared gradients that is kept
    epsilon: PositiveFloat = 1e-8  # added to the root of squared gradients


class DeltaMomentum(RuleSection):
    """Momentum that erases what it holds along the new gradient (eqs. 48-49). Matrices only."""

    kind: Literal["delta_momentum"]
    inertia: Fraction = 0.9  # share of the running sum that is kept a step
    erase: Fraction = 0.9  # at most inertia
    square_keep: Keep | None = None  # null: gradients are not preconditioned

    @model_validator(mode="after")
    def _stable(self) -> "DeltaMomentum":
        if self.erase > self.inertia:
            raise ValueError(
                f"erase {self.erase} is above inertia {self.inertia}: the momentum would turn its sign along the "
                f"gradient at each step; use erase={self.inertia} or less"
            )
        return self


class DeepMomentum(RuleSection):
    """The step is the output of a small MLP trained on the gradients, DMGD (eq. 50). Matrices only."""

    kind: Literal["dmgd"]
    inertia: Fraction = 0.9
    memory_rate: PositiveFloat = 1.0  # at most 1 for l2, 1 - inertia for dot
    hidden: Annotated[int, Field(ge=4)] = 16
    objective: Literal["l2", "dot"] = "l2"
    scale: Literal["gradient", "adamw"] = "gradient"  # size of a step: the gradient's, or that of AdamW

    @model_validator(mode="after")
    def _stable(self) -> "DeepMomentum":
        limit = 1.0 if self.objective == "l2" else round(1 - self.inertia, 12)
        if self.memory_rate > limit:
            raise ValueError(
                f"memory_rate {self.memory_rate} is too large: with objective={self.objective} and "
                f"inertia={self.inertia} the memory stays bounded up to {limit}; use that or less"
            )
        return self


class Adam(RuleSection):
    """Adam (appendix B)."""

    kind: Literal["adam"]
    mean_keep: Keep = 0.9  # share of the mean of gradients that is kept a step
    square_keep: Keep = 0.99  # the same of squared gradients
    epsilon: PositiveFloat = 1e-8  # added to the root of squared gradients


class Muon(RuleSection):
    """The orthogonal part of the momentum (eqs. 42-44), sized like AdamW's updates. Matrices only."""

    kind: Literal["muon"]
    inertia: Keep = 0.95  # share of the running sum that is kept a step
    look_ahead: bool = True  # Nesterov momentum
    iterations: Iterations = 5  # Newton-Schulz iterations


class M3(RuleSection):
    """Multi-scale momentum Muon (Algorithm 1), sized like AdamW's updates in mode `ema`. Matrices only."""

    kind: Literal["m3"]
    mode: Literal["ema", "literal"] = "ema"  # how both momenta are combined
    beta1: Keep = 0.95  # share of the fast momentum kept
    beta2: Keep = 0.95  # share of squared gradients kept
    beta3: Keep = 0.9  # share of the slow momentum kept
    slow_weight: NonNegativeFloat = 0.3  # weight of the slow momentum
    slow_every: Count = 50  # steps between two updates of the slow momentum
    iterations: Iterations = 5  # Newton-Schulz iterations
    epsilon: PositiveFloat = 1e-2  # added to the root of squared gradients


class DeltaGradientDescent(RuleSection):
    """The proximal step of layers whose inputs are known, DGD (eqs. 56-57). Levels that write in context only."""

    kind: Literal["dgd"]
    erase: Literal["written", "whole"] = "written"  # along the inputs: what was written in context, or all of the layer


UpdateRule = Annotated[
    GradientDescent
    | Momentum
    | PreconditionedMomentum
    | DeltaMomentum
    | DeepMomentum
    | Adam
    | Muon
    | M3
    | DeltaGradientDescent,
    Field(discriminator="kind"),
]


def _is_for_training(rule: UpdateRule) -> UpdateRule:
    """Refuse a rule that the optimizer of a run cannot serve."""
    if isinstance(rule, DeltaGradientDescent):
        raise ValueError(
            "rule dgd needs to know what each layer read, and the optimizer of a run sees gradients only; it is there "
            "for levels that write in context (model.channel.levels[].in_context.rule) and, in Python, as the class "
            "DeltaGradientDescent of optim/delta_gradient_descent.py; choose another rule, such as delta_momentum"
        )
    return rule


TrainingRule = Annotated[UpdateRule, AfterValidator(_is_for_training)]
"""A rule for the matrices of a model in training."""
