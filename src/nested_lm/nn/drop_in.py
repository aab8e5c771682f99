"""The layers of Hope and its baselines as modules of any network: `y, state = layer(x)`, then `layer(x, state)`.

A layer wraps the mixer or channel memory that the language model uses (`layer.core`). It fills in what the model knows
for its blocks: how far the stream has come, where documents start, how the weights begin.

Shapes: B batch, T tokens, D layer width.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import SerializeAsAny, ValidationError
from torch import Tensor, nn

from nested_lm.config import baselines, channels, mixers
from nested_lm.config.explain import explain
from nested_lm.config.provenance import Provenance, config_error
from nested_lm.config.section import Section
from nested_lm.errors import ConfigError
from nested_lm.nn.block import Block
from nested_lm.nn.channels.cms import ContinuumMemory as _Levels
from nested_lm.nn.channels.registry import build_channel
from nested_lm.nn.layers import StepContext, twice_differentiable
from nested_lm.nn.mixers.base import Mixer
from nested_lm.nn.mixers.registry import build_mixer
from nested_lm.nn.part import initialise
from nested_lm.nn.starts import check_starts, number_documents
from nested_lm.nn.state import StreamState, iterate_tensors
from nested_lm.ops.triangular import inside_transform

EPSILON = 1e-6
"""Of all norms, as in `ModelConfig`."""

HEAD_WIDTH = 32
"""Width of a head at least, where the number of heads is left open."""

TITANS: dict[str, Any] = {
    "adapt": ("memory",),
    "erase": "none",
    "momentum": "mean",
    "rates": {"memory": 0.125},  # without erase, rate x chunk beyond 2 overshoots
    "rate_stretch": 0.0,
    "expansion": 2.0,
}
"""Settings by which the self-modifying memories are Titans' neural memory, as in configs/model/titans_lmm_demo.yaml."""


class LayerConfig(Section):
    """What a layer is. Its states carry it, so that no other layer goes on with them."""

    width: int
    mixer: SerializeAsAny[mixers.MixerSection] | None = None
    channel: SerializeAsAny[channels.ChannelSection] | None = None


class LayerOutput(NamedTuple):
    """What a call of a layer gives: the result for every token, and the state for the next call."""

    y: Float[Tensor, "B T D"]
    state: StreamState


class Layer(nn.Module):
    """Base of all layers. Not built itself.

    A state holds what the layer remembers of each sequence: `state.detach()` cuts the gradient into earlier calls,
    `state.freeze()` ends all writes, `state.select(rows)` picks sequences, `state.to(device)` moves it. A call changes
    no state, it returns a new one.
    """

    core: nn.Module
    config: LayerConfig

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: StreamState | None = None,
        *,
        resets: Bool[Tensor, "B T"] | None = None,
    ) -> LayerOutput:
        """Read tokens, whatever their number. Cut anywhere into several calls, the results are the same.

        Args:
            x: vectors, of the type and on the device of the layer.
            state: what an earlier call returned; None for sequences that begin here.
            resets: True at the first token of a document, which sees nothing of what came before. Documents start at
                multiples of `alignment`, counted from the start of the sequence. Best on the CPU, where it is checked.

        Raises:
            TypeError: x is not a floating-point tensor, or the state is none.
            ValueError: x has another width, no tokens, another type or device than the layer, or (checked on the CPU
                only) values that are not finite; the state is of another layer, batch or device; a document starts
                where none can.
        """
        state, starts = self._check(x, state, resets)
        context, state = self._context(state, starts, x.shape[1])
        with twice_differentiable() if context.differentiable_twice else nullcontext():
            y, after = self._read(x, context, state.layers[0])
        return LayerOutput(y, replace(state, layers=(after,), position=state.position + x.shape[1]))

    def initial_state(self, batch_size: int) -> StreamState:
        """State of sequences that begin."""
        return StreamState((self._initial(batch_size),), position=0, packed=False, model=self.config)

    @property
    def alignment(self) -> int:
        """Documents start at multiples of this many tokens."""
        return 1 if self.config.mixer is None else self.config.mixer.alignment

    def reset_parameters(self) -> None:
        """Draw all weights anew, from torch's global generator."""

        def normal(tensor: Tensor, std: float) -> None:
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float32, device=tensor.device) * std)

        parts = (self.core.mixer, self.core.channel) if isinstance(self.core, Block) else (self.core,)
        initialise(self.core, parts, normal, residual=1.0)

    def extra_repr(self) -> str:
        """The width, for print."""
        return f"width={self.config.width}"

    def _initial(self, batch_size: int) -> Any:
        raise NotImplementedError

    def _read(self, x: Tensor, context: StepContext, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _cached_documents(self, state: Any) -> Tensor | None:  # noqa: ARG002  of layers that attend
        return None

    def _context(self, state: StreamState, starts: Tensor | None, tokens: int) -> tuple[StepContext, StreamState]:
        """What the layer needs to know of the call's tokens."""
        documents, packed = None, state.packed or starts is not None
        if packed:
            documents = number_documents(self._cached_documents(state.layers[0]), starts, tokens)
        twice = self.differentiable_twice or inside_transform()
        context = StepContext(state.position, starts, documents, state.frozen, differentiable_twice=twice)
        return context, replace(state, packed=packed)

    @torch.compiler.disable
    def _check(self, x: Tensor, state: StreamState | None, resets: Tensor | None) -> tuple[StreamState, Tensor | None]:
        """Refuse what the layer cannot read. Returns the state and the document starts on the device."""
        name, width = type(self).__name__, self.config.width
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name} reads floating-point vectors of shape (B, T, {width}), and x is {what}; embed token ids "
                "first, or use x.float()"
            )
        if x.ndim != 3 or x.shape[2] != width:
            raise ValueError(f"{name} reads (B, T, {width}), and x has the shape {tuple(x.shape)}")
        if not x.numel():
            raise ValueError(f"{name} was given no tokens: x has the shape {tuple(x.shape)}; leave the call out")
        weight = next(self.parameters())
        if x.device != weight.device or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(
                f"x is {x.dtype} on {x.device}, and {name} is {weight.dtype} on {weight.device}; use layer.to(x)"
            )
        if x.device.type == "cpu" and not inside_transform() and not bool(x.detach().isfinite().all()):
            row, token = (int(index) for index in (~x.detach().isfinite()).any(dim=2).nonzero()[0])
            raise ValueError(f"x is not finite at row {row}, token {token}; a memory would keep that for good")
        if state is None:
            state = self.initial_state(x.shape[0])
        elif not isinstance(state, StreamState):
            raise TypeError(f"state is a {type(state).__name__}; give what an earlier call of this layer returned")
        else:
            state.check_model(self.config)
            state.check_rows(None, x.shape[0])
            place = iterate_tensors(state.layers)[0].device
            if place != x.device:
                raise ValueError(f"the state is on {place} and x on {x.device}; use state.to(x.device)")
        if state.frozen and resets is not None:
            raise ValueError("a document cannot start in a frozen state, whose memories keep what they hold")
        starts = check_starts(resets, position=state.position, tokens=x.shape[1], alignment=self.alignment)
        return state, None if starts is None else starts.to(x.device, non_blocking=True)

    def _start(self, core: nn.Module, config: LayerConfig, *, differentiable_twice: bool) -> None:
        self.core, self.config, self.differentiable_twice = core, config, differentiable_twice
        self.reset_parameters()


class MixerLayer(Layer):
    """Base of layers that move information between tokens. Not built itself.

    Args:
        width: of the vectors.
        num_heads: each with `head_width` channels; None: as many as have at least 32 channels.
        differentiable_twice: gradients through the layer can be differentiated again, such as with
            `torch.autograd.grad(..., create_graph=True)`, at a lower speed. Inside `torch.func` they always can.
        settings: fields of the configuration section (`section`), such as `chunk`. `head_width` is width / num_heads
            where it is not given.

    Raises:
        ConfigError: a setting that does not exist or is impossible, with the nearest that is.
    """

    section: ClassVar[type[mixers.MixerSection]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    core: Mixer

    def __init__(
        self, width: int, *, num_heads: int | None = None, differentiable_twice: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        section = _mixer_section(self, width, num_heads, settings)
        core = build_mixer(section, width, epsilon=EPSILON, recompute=False)
        self._start(core, LayerConfig(width=width, mixer=section), differentiable_twice=differentiable_twice)

    def _initial(self, batch_size: int) -> Any:
        return self.core.initial_state(batch_size)

    def _read(self, x: Tensor, context: StepContext, state: Any) -> tuple[Tensor, Any]:
        y, after, _ = self.core(x, context, state)
        return y, after

    def _cached_documents(self, state: Any) -> Tensor | None:
        return self.core.documents(state)


class SelfModifyingTitans(MixerLayer):
    """Mixer of Hope: memories that generate their own keys, values, rates and retention while they are written.

    The memories are written also under `torch.no_grad()` and in `eval()`; gradients flow through the writes.

    Source: arXiv 2512.24695 section 8. Settings: `config/mixers.py`, class `SelfModifying`.
    """

    section = mixers.SelfModifying


class TitansMemory(MixerLayer):
    """Titans' neural memory (LMM): a two-layer network, written by gradient descent with momentum and decay.

    Source: arXiv 2501.00663. Settings: `config/mixers.py`, class `SelfModifying`, starting from `TITANS`.
    """

    section = mixers.SelfModifying
    defaults = TITANS


class GatedDeltaNet(MixerLayer):
    """One matrix a head that fades, and in which every token replaces what its key has held.

    Source: arXiv 2412.06464. Settings: `config/baselines.py`, class `GatedDeltaNet`.
    """

    section = baselines.GatedDeltaNet


class DeltaNet(MixerLayer):
    """One matrix a head, in which every token replaces what its key has held.

    Source: arXiv 2406.06484. Settings: `config/baselines.py`, class `DeltaNet`.
    """

    section = baselines.DeltaNet


class LinearAttention(MixerLayer):
    """One matrix a head that sums v k, read by q.

    Source: arXiv 2512.24695 eqs. 14-18. Settings: `config/baselines.py`, class `LinearAttention`.
    """

    section = baselines.LinearAttention


class Attention(MixerLayer):
    """Causal softmax attention with rotary positions; `window` tokens, or all before. Its state is the cache.

    Settings: `config/mixers.py`, class `FullAttention`.
    """

    section = mixers.FullAttention


class _LevelLayer(Layer):
    """What layers with the levels of a Continuum Memory System share."""

    periods: tuple[int, ...]

    def level_parameters(self) -> list[list[nn.Parameter]]:
        """Weights of each level, fastest first: give each an optimizer, and step it every `periods[level]` steps."""
        return [list(level.parameters()) for level in self._levels.levels]

    @property
    def _levels(self) -> _Levels:
        levels = self.core.channel if isinstance(self.core, Block) else self.core
        assert isinstance(levels, _Levels)
        return levels


class ContinuumMemory(_LevelLayer):
    """Residual MLPs in a chain, each to be updated on its own clock: y = x + MLP(x), level after level.

    It works on each token by itself, so the state has nothing to remember. The clocks are those of your optimizers,
    see `level_parameters`; levels that are written while the model reads need its next-token loss, and are an option
    of `LanguageModel`.

    Args:
        width: of the vectors.
        periods: optimizer steps between two updates of each level, fastest first; each a multiple of the one before.
        expansion: hidden width of a level / width.
        wiring: a chain (`sequential`, or `nested`, where a level starts again when the next slower one is updated), or
            `independent`: all levels read x, and their outputs are added with learned weights.

    Raises:
        ConfigError: periods that do not nest, or another impossible setting.

    Source: arXiv 2512.24695 eqs. 70-74.
    """

    def __init__(
        self,
        width: int,
        *,
        periods: Sequence[int] = (1, 4),
        expansion: float = 2.0,
        wiring: Literal["sequential", "nested", "independent"] = "sequential",
    ) -> None:
        super().__init__()
        section = _levels_section(self, width, periods, expansion, wiring)
        self.periods = section.periods
        core = build_channel(section, width, epsilon=EPSILON, layer=0, num_layers=1)
        self._start(core, LayerConfig(width=width, channel=section), differentiable_twice=False)

    def _initial(self, batch_size: int) -> Tensor:
        return next(self.parameters()).new_zeros(batch_size, 0)

    def _read(self, x: Tensor, context: StepContext, state: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.core(x, {}), state


class HopeBlock(_LevelLayer):
    """A whole block of Hope: x + SelfModifyingTitans(norm(x)), then a Continuum Memory. Norms and residuals inside.

    Args:
        width, num_heads, differentiable_twice, settings: as of `SelfModifyingTitans`.
        periods, level_expansion, wiring: as of `ContinuumMemory`.

    Raises:
        ConfigError: a setting that does not exist or is impossible, with the nearest that is.

    Source: arXiv 2512.24695 eqs. 94-97.
    """

    section: ClassVar[type[mixers.MixerSection]] = mixers.SelfModifying
    defaults: ClassVar[Mapping[str, Any]] = {}
    core: Block

    def __init__(
        self,
        width: int,
        *,
        num_heads: int | None = None,
        periods: Sequence[int] = (1, 4),
        level_expansion: float = 2.0,
        wiring: Literal["sequential", "nested", "independent"] = "sequential",
        differentiable_twice: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        section = _mixer_section(self, width, num_heads, settings)
        levels = _levels_section(self, width, periods, level_expansion, wiring)
        self.periods = levels.periods
        core = Block(
            width,
            build_mixer(section, width, epsilon=EPSILON, recompute=False),
            build_channel(levels, width, epsilon=EPSILON, layer=0, num_layers=1),
            epsilon=EPSILON,
        )
        config = LayerConfig(width=width, mixer=section, channel=levels)
        self._start(core, config, differentiable_twice=differentiable_twice)

    def _initial(self, batch_size: int) -> Any:
        return self.core.mixer.initial_state(batch_size)

    def _read(self, x: Tensor, context: StepContext, state: Any) -> tuple[Tensor, Any]:
        y, after, _ = self.core(x, context, state, {})
        return y, after


def _mixer_section(
    layer: MixerLayer | HopeBlock, width: int, num_heads: int | None, settings: Mapping[str, Any]
) -> mixers.MixerSection:
    """The mixer's configuration from keywords."""
    name, section = type(layer).__name__, layer.section
    _check_width(name, width)
    if num_heads is None:
        num_heads = max(heads for heads in range(1, max(width // HEAD_WIDTH, 1) + 1) if width % heads == 0)
    kind = section.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    chosen = {"kind": kind, **layer.defaults, **settings, "num_heads": num_heads}
    takes_width = "head_width" in section.model_fields
    if takes_width and "head_width" not in chosen and isinstance(num_heads, int) and num_heads > 0:
        if width % num_heads:
            near = max(heads for heads in range(1, num_heads + 1) if width % heads == 0)
            raise ConfigError(
                f"{name}: width {width} is not a multiple of num_heads {num_heads}; try num_heads={near}, or set "
                "head_width"
            )
        chosen["head_width"] = width // num_heads
    made: mixers.MixerSection = _validated(name, section, chosen)
    try:
        made.check_width(width)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    return made


def _levels_section(
    layer: Layer, width: int, periods: Sequence[int], expansion: float, wiring: str
) -> channels.ContinuumMemory:
    """The configuration of levels from keywords."""
    name = type(layer).__name__
    _check_width(name, width)
    levels = [{"period_tokens": period, "expansion": expansion} for period in periods]
    made: channels.ContinuumMemory = _validated(
        name, channels.ContinuumMemory, {"kind": "cms", "levels": levels, "wiring": wiring}
    )
    return made


def _check_width(name: str, width: int) -> None:
    if not isinstance(width, int) or width < 1:
        raise ConfigError(f"{name}: width is {width!r}, and must be a whole number of at least 1")


def _validated(name: str, section: type[Section], settings: Mapping[str, Any]) -> Any:
    """Make a section of keywords; mistakes are named as keywords of the layer."""
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        issues = explain(error, section, Provenance(), "")
        named = [replace(issue, path=name) if issue.path == "the whole preset" else issue for issue in issues]
        raise config_error(name, named) from None
