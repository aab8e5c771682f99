"""The one language model: embedding, blocks, norm, head. Which model it is, the configuration says.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nested_lm.config.model import ModelConfig
from nested_lm.nn.block import Block
from nested_lm.nn.channels.in_context import Fast, InContextWriter
from nested_lm.nn.layers import RMSNorm, StepContext
from nested_lm.nn.loss import IGNORED_TARGET, token_losses
from nested_lm.nn.mixers.attention import Attention
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.nn.state import ModelOutput, StreamState, map_tensors, take_rows
from nested_lm.ops.memory.state import check_branches

__all__ = ["IGNORED_TARGET", "LanguageModel", "ModelOutput", "ParameterRole", "token_losses"]


class ParameterRole(NamedTuple):
    """What a parameter is for, so that the optimizer can treat it accordingly.

    level: index of the Continuum Memory level it belongs to; None outside the chain.
    """

    kind: Literal["embedding", "matrix", "vector", "memory"]
    level: int | None


class LanguageModel(nn.Module):
    """Autoregressive language model with explicit stream state.

    recompute: what backward computes again instead of keeping: each memory chunk, each block, or nothing.
    """

    def __init__(self, config: ModelConfig, *, recompute: Literal["none", "chunk", "block"] = "none") -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, layer, recompute_chunks=recompute == "chunk") for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.writer = None
        if config.writes_in_context:
            self.writer = InContextWriter(config.channel, [block.channel.level_mlps() for block in self.blocks])

    @property
    def has_constant_state(self) -> bool:
        """Whether the state keeps its size however long the stream."""
        return all(block.mixer.has_constant_state for block in self.blocks)

    @property
    def has_fast_weights(self) -> bool:
        """Whether reading writes anything but a cache of keys and values."""
        return self.writer is not None or any(not isinstance(block.mixer, Attention) for block in self.blocks)

    @property
    def frozen_reach(self) -> int | None:
        """Tokens after which a frozen state no longer depends on those before; None: it may depend on all.

        Self-modifying memories that nothing is written to know other tokens by their convolutions only.
        """
        if self.writer is not None or not all(isinstance(block.mixer, SelfModifyingTitans) for block in self.blocks):
            return None
        return sum(block.mixer.config.conv_width - 1 for block in self.blocks)

    @property
    def memories(self) -> tuple[str, ...]:
        """Names of the self-modifying memories of a head; none when no block has any."""
        found = (module.rule.adapt for module in self.modules() if isinstance(module, SelfModifyingTitans))
        return next(found, ())

    @property
    def reads_branches(self) -> bool:
        """Whether `forward` takes `branches`: where self-modifying memories in C are all that knows of other tokens."""
        return self.writer is None and all(getattr(block.mixer, "reads_branches", False) for block in self.blocks)

    def initial_state(self, batch_size: int) -> StreamState:
        """State of streams that have read nothing."""
        layers = tuple(block.mixer.initial_state(batch_size) for block in self.blocks)
        state = StreamState(layers, position=0, packed=False, model=self.config)
        if self.writer is None:
            return state
        return replace(state, in_context=self.writer.initial_state(batch_size, layers, self.embedding.weight.device))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        resets: Bool[Tensor, "B T"] | None = None,
        state: StreamState | None = None,
        predictions: Literal["all", "last"] = "all",
        places: Int[Tensor, "n 2"] | None = None,
        final: bool = False,
        rows: Int[Tensor, " B"] | None = None,
        branches: Int[Tensor, "B N"] | None = None,
    ) -> ModelOutput:
        """Predict the token after each token.

        Levels with an in-context clock are written at its borders, also under `torch.no_grad()`: the outputs from
        a border on use them, and the state carries them.

        Args:
            tokens: token ids.
            resets: True at the first token of a document, whose state starts afresh. A start must lie on a multiple
                of `ModelConfig.alignment`, counted from the start of the stream.
            state: where the streams stand; None for streams that begin here. It is not changed. When it is frozen, no
                fast weight is written.
            predictions: `last` gives the logits of the last token only: the head costs as much as several layers.
            places: rows and columns of the tokens to predict after, instead: the logits have the shape (1, n, V).
            final: the streams end with this call, and the output has the state that was given. Without gradients,
                memories in C then leave out what is there to go on from, which is half of the work for a few tokens
                of many streams; other mixers may do it in vain.
            rows: the stream of the state that each row of tokens goes on from, as with `state.select(rows)`. In a final
                call of a self-modifying mixer in C that is not inside another mixer, no state is copied. None: its own.
            branches: where the branches of each row of tokens begin, and where the last one ends: texts behind one
                another that all go on from what comes before the first one (`check_branches` in
                ops/memory/state.py), as several rows would from one state. Only in a final call without gradients of a
                model that `reads_branches`; logits behind the last branch mean nothing. None: rows do not branch.

        Raises:
            ValueError: a document starts inside a chunk or an in-context segment, or at all when the state is frozen;
                the state is of a model with another configuration, or has other streams than the tokens; branches that
                are none, or where rows cannot branch.
            IndexError: a row that the state does not have.
        """
        given = state = self.initial_state(tokens.shape[0]) if state is None else state
        state.check_model(self.config)
        state.check_rows(rows, tokens.shape[0])
        if state.frozen and resets is not None:
            raise ValueError("a document cannot start in a frozen state, whose memories keep what they hold")
        ends = final and not torch.is_grad_enabled()
        if rows is not None and (not ends or self.writer is not None or state.packed or resets is not None):
            state, rows = state.select(rows), None
        if branches is not None:
            branches = check_branches(branches, *tokens.shape)
        if branches is not None and not (ends and resets is None and self.reads_branches):
            raise ValueError(
                "rows branch in a final call without gradients and document starts, of a model that reads branches: "
                "self-modifying memories in C (model.mixer.backend), and no levels with an in-context clock"
            )
        last = predictions == "last"
        if self.writer is None or state.frozen:
            fast = tuple({} for _ in self.blocks) if self.writer is None else self.writer.fast_copies(state)
            output = self._predict(
                tokens, resets, state, fast, last=last, places=places, final=ends, rows=rows, branches=branches
            )
        else:
            twice = self.config.layers_differentiated_twice if torch.is_grad_enabled() else range(0)
            output = self.writer.read(partial(self._predict, twice=twice), tokens, resets, state)
            output = output._replace(logits=_choose(output.logits, last=last, places=places))
        return output._replace(state=given) if final else output

    def _predict(
        self,
        tokens: Int[Tensor, "B T"],
        resets: Bool[Tensor, "B T"] | None,
        state: StreamState,
        fast: Fast,
        *,
        last: bool = False,
        places: Int[Tensor, "n 2"] | None = None,
        twice: range = range(0),
        final: bool = False,
        rows: Int[Tensor, " B"] | None = None,
        branches: Int[Tensor, "B N"] | None = None,
    ) -> ModelOutput:
        """Pass over tokens with the given fast copies, which do not change on the way.

        last, places: what to predict after, see `_choose`. twice: layers whose mixers' gradients will be differentiated
        again. final, rows, branches: see `StepContext`.
        """
        context, packed = self._context(resets, state, tokens.shape[1])
        context = context._replace(final=final, branches=branches)
        x = self.embedding(tokens)
        stats: dict[str, Tensor] = {}
        layers: list[Any] = []
        for index, (block, layer, distances) in enumerate(zip(self.blocks, state.layers, fast, strict=True)):
            here = context._replace(differentiable_twice=index in twice)
            if rows is not None and getattr(block.mixer, "takes_rows", False):
                here = here._replace(rows=rows)
            elif rows is not None:
                layer = map_tensors(layer, partial(take_rows, rows=rows))
            given = block, x, here, layer, distances
            if self.recompute == "block" and torch.is_grad_enabled():
                x, layer, found = checkpoint(self._block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x, layer, found = self._block(*given)
            layers.append(layer)
            stats |= {f"layer{index}/{name}": value for name, value in found.items()}
        head = self.embedding.weight if self.head is None else self.head.weight
        logits = functional.linear(self.norm(_choose(x, last=last, places=places)), head)
        after = replace(state, layers=tuple(layers), position=state.position + tokens.shape[1], packed=packed)
        return ModelOutput(logits, after, stats)

    @staticmethod
    def _block(block: Block, x: Tensor, context: StepContext, *given: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Run one block; with kernels that can be differentiated twice where training needs that."""
        if not context.differentiable_twice:
            return block(x, context, *given)
        with sdpa_kernel(SDPBackend.MATH):
            return block(x, context, *given)

    def _context(self, resets: Bool[Tensor, "B T"] | None, state: StreamState, tokens: int) -> tuple[StepContext, bool]:
        """Work out what the blocks need to know about document starts."""
        if resets is not None and not bool(resets.any() if state.position else resets[:, 1:].any()):
            resets = None  # nothing starts here that the state does not already mean
        packed = state.packed or resets is not None
        documents = None
        if packed:
            documents = self._documents(resets, state, tokens)
        return StepContext(state.position, resets, documents, state.frozen), packed

    def _documents(self, resets: Bool[Tensor, "B T"] | None, state: StreamState, tokens: int) -> Tensor | None:
        """Number the documents of each row, going on from the attention cache; None when no block attends."""
        caches = [layer for layer in state.layers if hasattr(layer, "documents")]
        if not caches:
            return None
        cached = caches[0].documents
        last = cached[:, -1:] if cached.shape[1] else cached.new_zeros(cached.shape[0], 1)
        if resets is None:
            return last.expand(-1, tokens)
        return last + resets.long().cumsum(dim=1)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """Say what every parameter is for, by name."""
        roles = {}
        for name, parameter in self.named_parameters():
            level = self._level(name)
            if name.startswith(("embedding.", "head.")):
                roles[name] = ParameterRole("embedding", None)
            elif ".start_" in name:
                roles[name] = ParameterRole("memory", None)
            elif parameter.ndim == 2 and not name.endswith("conv.weight"):
                roles[name] = ParameterRole("matrix", level)
            else:
                roles[name] = ParameterRole("vector", level)
        return roles

    def _level(self, name: str) -> int | None:
        """Level of a parameter; None outside the levels."""
        found = re.match(r"blocks\.(\d+)\.channel\.(.+)", name)
        return self.blocks[int(found.group(1))].channel.level_of(found.group(2)) if found else None

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter. The one place where a number is drawn; the same seed gives the same model.

        Embeddings: normal with `init_std`. Matrices: normal with 1/sqrt(fan-in), the projections back into the
        residual stream smaller by sqrt(2 * num_layers). What is particular to a mixer, its own
        `initialise` sets afterwards.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(tensor: Tensor, std: float) -> None:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std
            tensor.copy_(drawn)

        residual = 1 / math.sqrt(2 * self.config.num_layers)
        normal(self.embedding.weight, self.config.init_std)
        if self.head is not None:
            normal(self.head.weight, self.config.init_std)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        for block in self.blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    scale = residual if name.endswith("out") else 1.0
                    normal(module.weight, scale / math.sqrt(module.in_features))
            if hasattr(block.mixer, "initialise"):
                block.mixer.initialise(normal)
            if hasattr(block.channel, "initialise"):
                block.channel.initialise()


def _choose(x: Float[Tensor, "B T D"], *, last: bool, places: Int[Tensor, "n 2"] | None) -> Float[Tensor, "_B _T D"]:
    """The tokens to predict after: those in some places, as one row, the last of each row, or all."""
    if places is not None:
        return x[places[:, 0], places[:, 1]][None]
    return x[:, -1:] if last else x
