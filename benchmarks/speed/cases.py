"""What is timed against what, at which sizes, and the ratios that are aimed for.

Widths, lengths and goals are those the project set itself before it was built; a goal is a ratio of tokens per
processor second, `first` the one a release needs, `stretch` the ambitious one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Package = Literal["nested_lm", "nested_learning", "titans_pytorch"]


@dataclass(frozen=True)
class Side:
    """One of those that take turns.

    job, arguments: of the package's worker. turns: at most so many, for slow sides; those run without a warm-up.
    same_size_as: name of an earlier side of the case, whose parameter count becomes the argument `parameters`.
    """

    name: str
    package: Package
    job: str
    arguments: dict[str, Any]
    precision: Literal["highest", "medium"] = "highest"
    turns: int | None = None
    same_size_as: str | None = None


@dataclass(frozen=True)
class Goal:
    """Speed of `side` over that of `against`; without `first` a ratio worth knowing that nothing was promised for."""

    name: str
    side: str
    against: str
    first: float | None = None
    stretch: float | None = None


@dataclass(frozen=True)
class Case:
    """Sides that take turns, and their ratios."""

    name: str
    about: str
    sides: tuple[Side, ...]
    goals: tuple[Goal, ...]


@dataclass(frozen=True)
class MemorySide:
    """A training step in a process of its own. model: key of `models`."""

    name: str
    model: str
    batch: int
    recompute: str
    same_size_as: str | None = None


@dataclass(frozen=True)
class MemoryGoal:
    """Peak memory of `side`, over that of `against` or in bytes, that it should not exceed."""

    name: str
    side: str
    against: str | None
    limit: float


@dataclass(frozen=True)
class Sizes:
    """Everything `--quick` makes small."""

    width: int = 256
    head_width: int = 64
    vocab: int = 4096
    layers: int = 4
    batch: int = 4
    tokens: int = 512
    long: tuple[int, ...] = (2048, 8192)  # tokens, at batch 1
    write_tokens: int = 256  # a sequence, of C1 and C2
    step_tokens: int = 128  # a sequence, of C3
    few_tokens: int = 64  # of what runs token by token
    chunks: tuple[int, int] = (16, 64)

    @property
    def heads(self) -> int:
        """Heads of every model."""
        return self.width // self.head_width


QUICK = Sizes(16, 8, 32, 2, 2, 8, (16,), 8, 8, 4, (2, 4))

PEER, TITANS = "nested-learning 0.2.0", "titans-pytorch 0.5.5"


def hope(size: Sizes, chunk: int, **options: Any) -> dict[str, Any]:
    """Mixer of the scale presets: the defaults, with their head width and chunk."""
    return {"kind": "self_modifying", "num_heads": size.heads, "head_width": size.head_width, "chunk": chunk} | options


def one_memory(size: Sizes, chunk: int) -> dict[str, Any]:
    """Titans' memory as printed: values as targets, no erase, a running sum of writes (the presets have a mean)."""
    options = {"adapt": ["memory"], "targets": "values", "erase": "none", "momentum": "sum"}
    return hope(size, chunk, **options, rates={"memory": 1.6 / chunk}, rate_init=0.5)


def attention(size: Sizes) -> dict[str, Any]:
    """Mixer of Transformer++."""
    return {"kind": "attention", "num_heads": size.heads}


def models(size: Sizes) -> dict[str, dict[str, Any]]:
    """Whole models, shaped as configs/model/hope_pilot.yaml and its baseline."""
    common = {"vocab_size": size.vocab, "width": size.width, "num_layers": size.layers}
    levels = [{"period_tokens": 2048 * 4**level, "expansion": 1.25} for level in range(4)]
    chain = {"kind": "cms", "levels": levels}
    return {
        "hope": common | {"mixer": hope(size, size.chunks[1]), "channel": chain},
        "hope chunk 1": common | {"mixer": hope(size, 1), "channel": chain},
        "transformer++": common | {"mixer": attention(size), "channel": {"kind": "swiglu", "expansion": 4.0}},
    }


def timed_mixers(size: Sizes) -> Iterator[dict[str, Any]]:
    """Memories that are timed, for the gate: it checks their rules."""
    for chunk in (1, *size.chunks):
        yield hope(size, chunk)
    yield hope(size, size.chunks[1], erase="input")
    yield one_memory(size, size.chunks[1])


def cases(size: Sizes) -> list[Case]:
    """Everything that is timed."""
    return [_writes(size), _two_layers(size), *_titans(size), *_attention(size), _loop(size), _whole(size)]


def _mixer(name: str, mixer: dict[str, Any], size: Sizes, batch: int, tokens: int, **more: Any) -> Side:
    arguments = {"mixer": mixer, "width": size.width, "batch": batch, "tokens": tokens, "train": True}
    return Side(name, "nested_lm", "mixer", arguments | more.pop("arguments", {}), **more)


def _writes(size: Sizes) -> Case:
    chunk, shape = size.chunks[1], (size.batch, size.write_tokens)
    reads = {"arguments": {"train": False}}
    wide = hope(size, chunk) | {"num_heads": 1, "head_width": size.width}
    peer = {"width": size.width, "chunk": chunk, "batch": shape[0], "tokens": shape[1]}
    return Case(
        "write pass",
        f"Self-modifying layer, forward with writes, no gradients: width {size.width}, chunk {chunk}, "
        f"{shape[0]} x {shape[1]} tokens.",
        (
            _mixer("Hope", hope(size, chunk), size, *shape, **reads),
            _mixer("Hope, one head of full width", wide, size, *shape, **reads),
            Side(PEER, "nested_learning", "write_pass", peer, turns=3),
        ),
        (Goal("C1", "Hope", PEER, 100, 200), Goal("C2", "Hope, one head of full width", PEER, 50, 100)),
    )


def _two_layers(size: Sizes) -> Case:
    batch, tokens = 2, size.step_tokens
    model = models(size)["hope"] | {"num_layers": 2}
    shape = {"batch": batch, "tokens": tokens}
    peer = {"vocab": size.vocab, "width": size.width, "layers": 2, "heads": size.heads} | shape
    return Case(
        "training step, two layers",
        f"Width {size.width}, {batch} x {tokens} tokens. Ours with gradients through the writes, the peer's fast mode "
        "without; equal parameters.",
        (
            Side(PEER, "nested_learning", "fast_step", peer, turns=3),
            Side("Hope", "nested_lm", "language_model", {"model": model} | shape, same_size_as=PEER),
        ),
        (Goal("C3", "Hope", PEER, 40, 100),),
    )


def _titans(size: Sizes) -> Iterator[Case]:
    shape = {"batch": size.batch, "tokens": size.tokens}
    where = f"width {size.width}, {size.heads} heads, {size.batch} x {size.tokens} tokens"

    def theirs(name: str, chunk: int, expansion: float) -> Side:
        arguments = {"width": size.width, "head_width": size.head_width, "chunk": chunk, "expansion": expansion}
        return Side(name, "titans_pytorch", "memory", arguments | shape)

    sides, goals = [], []
    for chunk, first, stretch in zip(size.chunks, (2.5, 1.2), (4.0, 2.0), strict=True):
        ours, other = f"Hope, chunk {chunk}", f"{TITANS}, chunk {chunk}"
        sides.append(_mixer(ours, hope(size, chunk), size, **shape))
        sides.append(theirs(other, chunk, 2.0))
        sides.append(theirs(f"{other}, hidden width as shipped (4)", chunk, 4.0))
        goals.append(Goal(f"C4, chunk {chunk}", ours, other, first, stretch))
        goals.append(Goal(f"chunk {chunk}, as shipped", ours, f"{other}, hidden width as shipped (4)"))
    about = f"Layer, forward and backward, five memories against one of hidden width 2: {where}."
    yield Case("layer against titans-pytorch", about, tuple(sides), tuple(goals))
    chunk = size.chunks[1]
    yield Case(
        "one memory against titans-pytorch",
        f"Layer, forward and backward, one memory of hidden width 1 on both sides, chunk {chunk}: {where}.",
        (_mixer("one memory", one_memory(size, chunk), size, **shape), theirs(TITANS, chunk, 1.0)),
        (Goal("C5", "one memory", TITANS, 1.5, 2.5),),
    )


def _attention(size: Sizes) -> Iterator[Case]:
    chunk = size.chunks[1]
    mixers = {
        "attention": attention(size),
        "Hope": hope(size, chunk),
        "Hope, erase input": hope(size, chunk, erase="input"),
    }
    aims = ((0.30, 0.45), (0.40, 0.60), (1.2, 2.0))
    for tokens, (first, stretch) in zip((size.tokens, *size.long), aims, strict=False):
        batch = size.batch if tokens == size.tokens else 1
        sides = tuple(
            _mixer(f"{name}, {precision}", mixer, size, batch, tokens, precision=precision)
            for precision in ("highest", "medium")
            for name, mixer in mixers.items()
        )
        goals = tuple(
            Goal(f"C6, T={tokens}, {name}, {precision}", f"{name}, {precision}", f"attention, {precision}", *aim)
            for name, precision, aim in (
                ("Hope", "highest", ()),
                ("Hope", "medium", (first, stretch)),
                ("Hope, erase input", "medium", (first, stretch)),
            )
        )
        about = (
            f"Layer, forward and backward, chunk {chunk}, width {size.width}, {batch} x {tokens} tokens, with float32 "
            "products at torch's settings `highest` and `medium`."
        )
        yield Case(f"layer against causal attention, T={tokens}", about, sides, goals)


def _loop(size: Sizes) -> Case:
    shape = {"heads": size.heads, "head_width": size.head_width, "tokens": size.few_tokens, "chunk": size.few_tokens}
    return Case(
        "chunk form against token-by-token loop",
        f"The memories alone, forward and backward, {size.few_tokens} tokens, {size.heads} heads: in torch (`chunked`) "
        "and in C (`cpu`).",
        tuple(Side(form, "nested_lm", "memory", shape | {"backend": form}) for form in ("chunked", "reference", "cpu")),
        (
            Goal("C7", "chunked", "reference", 30, 60),
            Goal("C7, C over reference", "cpu", "reference"),
            Goal("C7, C over chunk form", "cpu", "chunked"),
        ),
    )


@dataclass(frozen=True)
class _Whole:
    """Sides of the whole language model."""

    size: Sizes
    shape: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", {"batch": self.size.batch, "tokens": self.size.tokens})

    def ours(self, name: str, model: str, *, like: str | None = "Hope", batch: int | None = None, **more: Any) -> Side:
        """A model of this project; `like` gives its size."""
        arguments = {"model": models(self.size)[model]} | self.shape | more.pop("arguments", {})
        arguments["batch"] = batch or self.shape["batch"]
        return Side(name, "nested_lm", "language_model", arguments, same_size_as=like, **more)

    def other(self, name: str, package: Package, job: str, arguments: dict[str, Any], **more: Any) -> Side:
        """A model of somebody else."""
        common = {"vocab": self.size.vocab, "width": self.size.width, "layers": self.size.layers}
        return Side(name, package, job, common | arguments, **more)


CHUNK_ONE = {"recompute": "chunk"}
"""Setting of the models that write token by token, in time and in memory; it takes least memory."""


def _whole(size: Sizes) -> Case:
    make, heads = _Whole(size), {"heads": size.heads}
    lmm = make.shape | {"head_width": size.head_width, "chunk": size.chunks[1]}
    sides = (
        make.ours("Hope", "hope", like=None),
        make.ours("Transformer++", "transformer++"),
        make.other("torch.nn Transformer", "nested_lm", "plain_transformer", heads | make.shape, same_size_as="Hope"),
        make.ours("Hope, medium", "hope", like=None, precision="medium"),
        make.ours("Transformer++, medium", "transformer++", precision="medium"),
        make.ours("Hope, chunk 1, batch 1", "hope chunk 1", batch=1, turns=2, arguments=CHUNK_ONE),
        make.other(f"{TITANS} LMM", "titans_pytorch", "language_model", lmm, same_size_as="Hope"),
        make.other(f"{PEER}, fast", "nested_learning", "fast_step", heads | make.shape, turns=2),
        make.ours("Hope as large as the peer", "hope", like=f"{PEER}, fast"),
        make.other(f"{PEER}, online", "nested_learning", "online_step", heads | {"tokens": size.few_tokens}, turns=2),
    )
    goals = (
        Goal("LM", "Hope", "Transformer++", 0.5),
        Goal("LM, medium", "Hope, medium", "Transformer++, medium", 0.5),
        Goal("LM, torch.nn", "Hope", "torch.nn Transformer", 0.5),
        Goal("LM, titans-pytorch", "Hope", f"{TITANS} LMM"),
        Goal("LM, fast mode", "Hope", f"{PEER}, fast", 30),
        Goal("LM, fast mode, equal size", "Hope as large as the peer", f"{PEER}, fast", 30),
        Goal("LM, online mode", "Hope, chunk 1, batch 1", f"{PEER}, online", 12),
    )
    about = (
        f"Training step (forward, backward, clipping, AdamW) of a language model: width {size.width}, {size.layers} "
        f"layers, vocabulary {size.vocab}, {size.batch} x {size.tokens} tokens unless said otherwise; the peer's "
        f"online mode on 1 x {size.few_tokens}, which its cost a token does not depend on."
    )
    return Case("whole language model", about, sides, goals)


def memory_cases(size: Sizes) -> tuple[tuple[MemorySide, ...], tuple[MemoryGoal, ...]]:
    """Training steps whose peak memory is measured, the same models as in the last case."""
    sides, goals = [], []
    for recompute in ("none", "block"):
        ours, other = f"Hope, recompute {recompute}", f"Transformer++, recompute {recompute}"
        sides.append(MemorySide(ours, "hope", size.batch, recompute))
        sides.append(MemorySide(other, "transformer++", size.batch, recompute, same_size_as=ours))
        goals.append(MemoryGoal(f"peak, recompute {recompute}", ours, other, 1.3))
    name = "Hope, chunk 1, batch 1"
    sides.append(MemorySide(name, "hope chunk 1", 1, CHUNK_ONE["recompute"], same_size_as=sides[0].name))
    goals.append(MemoryGoal("peak, chunk 1", name, None, 1.5e9))
    return tuple(sides), tuple(goals)
