"""The one language model: embedding, blocks, norm, head. Which model it is, the configuration says.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nested_lm.config.model import ModelConfig
from nested_lm.nn.block import Block
from nested_lm.nn.channels.in_context import Fast, InContextWriter
from nested_lm.nn.channels.registry import build_channel
from nested_lm.nn.layers import RMSNorm, StepContext, twice_differentiable
from nested_lm.nn.loss import IGNORED_TARGET, token_losses
from nested_lm.nn.mixers.registry import build_mixer
from nested_lm.nn.part import ParameterRole, kinds
from nested_lm.nn.starts import check_starts, number_documents
from nested_lm.nn.state import ModelOutput, StreamState, map_tensors, take_rows
from nested_lm.ops.memory.state import check_branches

__all__ = ["IGNORED_TARGET", "LanguageModel", "ModelOutput", "ParameterRole", "token_losses"]


class _Wish(NamedTuple):
    """What a reader wants of a call; the fields are arguments of `LanguageModel.predict`."""

    places: Tensor | None = None
    final: bool = False
    rows: Tensor | None = None
    branches: Tensor | None = None


class LanguageModel(nn.Module):
    """Autoregressive language model with explicit stream state.

    seed: of the weights, see `initialise`; None leaves them unset, for weights that are set right after.
    recompute: what backward computes again instead of keeping: each memory chunk, each block, or nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        recompute: Literal["none", "chunk", "block"] = "none",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(self._build_block(layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.writer = None
        if config.writes_in_context:
            self.writer = InContextWriter(config.channel, [block.channel.level_mlps() for block in self.blocks])
        if seed is not None and not self.embedding.weight.is_meta:
            self.initialise(seed)

    def _build_block(self, layer: int) -> Block:
        config, epsilon = self.config, self.config.norm_epsilon
        mixer = build_mixer(config.mixer, config.width, epsilon=epsilon, recompute=self.recompute == "chunk")
        channel = build_channel(
            config.channel, config.width, epsilon=epsilon, layer=layer, num_layers=config.num_layers
        )
        return Block(config.width, mixer, channel, epsilon=epsilon)

    @property
    def has_constant_state(self) -> bool:
        """Whether the state keeps its size however long the stream."""
        return all(block.mixer.has_constant_state for block in self.blocks)

    @property
    def has_fast_weights(self) -> bool:
        """Whether reading writes anything but a cache of keys and values."""
        return self.writer is not None or any(block.mixer.has_fast_weights for block in self.blocks)

    @property
    def frozen_reach(self) -> int | None:
        """Tokens after which a frozen state no longer depends on those before; None: it may depend on all."""
        reaches = [block.mixer.frozen_reach for block in self.blocks]
        return None if self.writer is not None or None in reaches else sum(reaches)

    @property
    def memories(self) -> tuple[str, ...]:
        """Names of the self-modifying memories of a head; none when no block has any."""
        return next((block.mixer.memories for block in self.blocks), ())

    @property
    def reads_branches(self) -> bool:
        """Whether `predict` takes `branches`: where self-modifying memories in C are all that knows of other tokens."""
        return self.writer is None and all(block.mixer.reads_branches for block in self.blocks)

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
    ) -> ModelOutput:
        """Predict the token after each token.

        Levels with an in-context clock are written at its borders, also under `torch.no_grad()`: the outputs from
        a border on use them, and the state carries them.

        Args:
            tokens: token ids.
            resets: True at the first token of a document, whose state starts afresh. A start must lie on a multiple
                of `ModelConfig.alignment`, counted from the start of the stream. Best on the host, where they are
                checked.
            state: where the streams stand; None for streams that begin here. It is not changed. When it is frozen, no
                fast weight is written.

        Raises:
            ValueError: a document starts inside a chunk or an in-context segment, or at all when the state is frozen;
                the state is of a model with another configuration, or has other streams than the tokens.
        """
        state = self.initial_state(tokens.shape[0]) if state is None else state
        state.check_model(self.config)
        state.check_rows(None, tokens.shape[0])
        if state.frozen and resets is not None:
            raise ValueError("a document cannot start in a frozen state, whose memories keep what they hold")
        return self._run(tokens, resets, state, _Wish())

    def predict(
        self,
        tokens: Int[Tensor, "B T"],
        places: Int[Tensor, "n 2"] | None,
        *,
        state: StreamState,
        final: bool = False,
        rows: Int[Tensor, " B"] | None = None,
        branches: Int[Tensor, "B N"] | None = None,
    ) -> ModelOutput:
        """Predict after some tokens only, and fork streams without copies: what `nested_lm.reading` reads with.

        Args:
            tokens, state: as in a call of the model.
            places: rows and columns of the tokens to predict after: the logits have the shape (1, n, V). The head costs
                as much as several layers. None: after all.
            final: the streams end with this call, and the output has the state that was given. Without gradients,
                memories in C then skip computing the next state, which halves the cost of short calls.
            rows: the stream of the state that each row of tokens goes on from, as with `state.select(rows)`. In a final
                call, memories in C copy no state. None: its own.
            branches: where the branches of each row of tokens begin, and where the last one ends: texts behind one
                another that all go on from what comes before the first one (`check_branches` in
                ops/memory/state.py). Only in a final call without gradients of a model that `reads_branches`; logits
                behind the last branch mean nothing. None: rows do not branch.

        Raises:
            ValueError: the state is of a model with another configuration, or has other streams than the tokens;
                `branches` is malformed, or rows cannot branch here.
            IndexError: a row that the state does not have.
        """
        state.check_model(self.config)
        state.check_rows(rows, tokens.shape[0])
        given, final = state, final and not torch.is_grad_enabled()
        if rows is not None and (not final or self.writer is not None or state.packed):
            state, rows = state.select(rows), None
        if branches is not None:
            branches = check_branches(branches, *tokens.shape)
            if not (final and self.reads_branches):
                raise ValueError(
                    "rows branch in a final call without gradients of a model that reads branches: self-modifying "
                    "memories in C (model.mixer.backend), and no levels with an in-context clock"
                )
        output = self._run(tokens, None, state, _Wish(places, final, rows, branches))
        return output._replace(state=given) if final else output

    def _run(
        self, tokens: Int[Tensor, "B T"], resets: Bool[Tensor, "B T"] | None, state: StreamState, wish: _Wish
    ) -> ModelOutput:
        """Pass over tokens; levels with an in-context clock are written on the way."""
        starts = check_starts(resets, position=state.position, tokens=tokens.shape[1], alignment=self.config.alignment)
        if self.writer is None or state.frozen:
            fast = tuple({} for _ in self.blocks) if self.writer is None else self.writer.fast_copies(state)
            if starts is not None:
                starts = starts.to(tokens.device, non_blocking=True)
            return self._predict(tokens, starts, state, fast, wish=wish)
        twice = self.config.layers_differentiated_twice if torch.is_grad_enabled() else range(0)
        output = self.writer.read(partial(self._predict, twice=twice), tokens, starts, state)
        return output._replace(logits=_choose(output.logits, wish.places))

    def _predict(
        self,
        tokens: Int[Tensor, "B T"],
        resets: Bool[Tensor, "B T"] | None,
        state: StreamState,
        fast: Fast,
        *,
        wish: _Wish | None = None,
        twice: range = range(0),
    ) -> ModelOutput:
        """Pass over tokens with the given fast copies, which do not change on the way.

        resets: checked. twice: layers whose mixers' gradients will be differentiated again.
        """
        wish = wish or _Wish()
        packed = state.packed or resets is not None
        documents = self._documents(resets, state, tokens.shape[1]) if packed else None
        context = StepContext(state.position, resets, documents, state.frozen, final=wish.final, branches=wish.branches)
        x = self.embedding(tokens)
        stats: dict[str, Tensor] = {}
        layers: list[Any] = []
        for index, (block, layer, distances) in enumerate(zip(self.blocks, state.layers, fast, strict=True)):
            here = context._replace(differentiable_twice=index in twice)
            if wish.rows is not None and block.mixer.takes_rows:
                here = here._replace(rows=wish.rows)
            elif wish.rows is not None:
                layer = map_tensors(layer, partial(take_rows, rows=wish.rows))
            arguments = block, x, here, layer, distances
            if self.recompute == "block" and torch.is_grad_enabled():
                x, layer, of_block = checkpoint(self._block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, layer, of_block = self._block(*arguments)
            layers.append(layer)
            stats |= {f"layer{index}/{name}": value for name, value in of_block.items()}
        head = self.embedding.weight if self.head is None else self.head.weight
        logits = functional.linear(self.norm(_choose(x, wish.places)), head)
        after = replace(state, layers=tuple(layers), position=state.position + tokens.shape[1], packed=packed)
        return ModelOutput(logits, after, stats)

    @staticmethod
    def _block(
        block: Block, x: Tensor, context: StepContext, *state_and_copies: Any
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Run one block; with kernels that can be differentiated twice where training needs that."""
        with twice_differentiable() if context.differentiable_twice else nullcontext():
            return block(x, context, *state_and_copies)

    def _documents(self, resets: Bool[Tensor, "B T"] | None, state: StreamState, tokens: int) -> Tensor | None:
        """Number the documents of each row; None when no block attends."""
        blocks = zip(self.blocks, state.layers, strict=True)
        cached = (block.mixer.documents(layer) for block, layer in blocks)
        return number_documents(next((numbers for numbers in cached if numbers is not None), None), resets, tokens)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """Say what every parameter is for, by name."""
        roles = {name: ParameterRole(kind, None) for name, kind in kinds(self).items()}
        if self.head is not None:
            roles["head.weight"] = ParameterRole("embedding", None)
        for index, block in enumerate(self.blocks):
            for name, _ in block.channel.named_parameters():
                path = f"blocks.{index}.channel.{name}"
                roles[path] = roles[path]._replace(level=block.channel.level_of(name))
        return roles

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

        normal(self.embedding.weight, self.config.init_std)
        if self.head is not None:
            normal(self.head.weight, self.config.init_std)
        self.norm.weight.fill_(1.0)
        for block in self.blocks:
            block.initialise(normal, residual=1 / math.sqrt(2 * self.config.num_layers))


def _choose(x: Float[Tensor, "B T D"], places: Int[Tensor, "n 2"] | None) -> Float[Tensor, "_B _T D"]:
    """The tokens to predict after: those in some places, as one row, or all."""
    return x if places is None else x[places[:, 0], places[:, 1]][None]
