"""Memory files: the state of a stream on disk, for the model that made it and no other.

One safetensors file: the state's tensors by path, and in its metadata a JSON header with the layout's version, the
model's identity, the position, the form of the state and digests. Written aside and renamed, so that a file is whole or
the one before. No pickle, no names of code.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nested_lm import __version__
from nested_lm.errors import CheckpointError, NumericsError
from nested_lm.nn.mixers.attention_cache import BranchedState
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import first_nonfinite
from nested_lm.nn.state import StreamState
from nested_lm.reading.identity import ModelIdentity, difference, tensors_hash, type_name
from nested_lm.reading.tree import first_difference, flatten, form_hash, rebuild
from nested_lm.storage.atomic import write_atomically

LAYOUT_VERSION = 1
"""Of the header and of how trees are named. A state's own form is compared by itself."""

_HEADER = "nested_lm_memory"
"""Key of the metadata whose value is the header's digest, a line break, and the header. One key: safetensors keeps no
order of several, and the same state shall be the same file."""


@dataclass(frozen=True)
class MemoryHeader:
    """What a memory file says about itself.

    model: whom it belongs to. streams: rows of the batch. state_bytes: memory that the state takes.
    written_by: version of this package. form, form_hash: of the state. values: leaves that are no tensors, by path.
    tensors_hash: of the tensors.
    """

    model: ModelIdentity
    streams: Annotated[int, Field(gt=0)]
    state_bytes: int
    written_by: str
    form: dict[str, str]
    form_hash: str
    values: dict[str, Any]
    tensors_hash: str

    @property
    def position(self) -> int:
        """Tokens read."""
        return int(self.values["position"])


_HEADERS = TypeAdapter(MemoryHeader)
_MOST_TOKENS = 1 << 60


def save_memory(path: Path, state: StreamState, model: ModelIdentity) -> MemoryHeader:
    """Write a state, replacing the file that is there; the old one stays whole until the new one is.

    Args:
        path: file to write; its folder is created.
        state: any state the model returned; gradients are not stored.
        model: `identify(...)` of the model that made it.

    Raises:
        NumericsError: a value is not finite; the old file is kept.
        DataError: the disk is full or the folder cannot be written; the old file is kept.
    """
    spoiled = first_nonfinite(state)
    if spoiled is not None:
        raise NumericsError(
            f"after {state.position:,} tokens of the stream the state is not finite: {spoiled}\n"
            f"  Nothing was written to {path}. The checkpoint has diverged, or the stream drove a memory out of range: "
            "use an earlier checkpoint, or start a new memory."
        )
    layers = tuple(layer.whole() if isinstance(layer, BranchedState) else layer for layer in state.layers)
    flat = flatten(replace(state, layers=layers).detach())
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in flat.tensors.items()}
    header = MemoryHeader(
        model=model,
        streams=num_streams(state),
        state_bytes=state.num_bytes(),
        written_by=__version__,
        form=flat.form,
        form_hash=form_hash(flat.form),
        values=flat.values,
        tensors_hash=tensors_hash(tensors),
    )
    fields = {name: getattr(header, name) for name in header.__dataclass_fields__} | {"model": model.as_document()}
    text = json.dumps({"layout": LAYOUT_VERSION, **fields}, allow_nan=False)
    write_atomically(path, save(tensors, {_HEADER: f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}"}))
    return header


def load_memory(path: Path, model: LanguageModel, identity: ModelIdentity) -> StreamState:
    """Read a state for a model, on the model's device. Every bit is as it was saved.

    identity: `identify(...)` of this model.

    Raises:
        CheckpointError: no such file, not a memory file, another layout, damaged, or of another model, type or form.
    """
    header = read_header(path)
    found = difference(header.model, identity)
    if found is not None:
        raise CheckpointError(
            f"{path} belongs to another model ({header.model.label}): {found}\n"
            "  Use the checkpoint it was made with, or read the documents again with this one: "
            "`nested-lm memorize` with another --memory, or with --overwrite."
        )
    template = model.initial_state(1)
    expected = flatten(template)
    other = first_difference(header.form, expected.form)
    if other is not None:
        where, here, there = other
        raise CheckpointError(
            f"{path} has a state of form {header.form_hash}, this version of nested-lm makes "
            f"{form_hash(expected.form)}: {where} is {here} there and {there} here\n"
            f"  It was written by version {header.written_by}: use that, or read the documents again with "
            "`nested-lm memorize`."
        )
    tensors = _read_tensors(path, header)
    for name, tensor in expected.tensors.items():
        _check_tensor(path, name, tensors.get(name), tensor, header.streams)
    for name, value in expected.values.items():
        if type(header.values.get(name)) is not type(value):
            raise _damaged(path, f"{name} is {header.values.get(name)!r}, which is no {type(value).__name__}")
    return rebuild(template, tensors, header.values).to(next(model.parameters()).device)


def read_header(path: Path) -> MemoryHeader:
    """Read what a memory file says about itself, without its tensors.

    Raises:
        CheckpointError: no such file, not a memory file, of another layout, or damaged.
    """
    seal, _, text = _read_metadata(path).partition("\n")
    try:
        fields = json.loads(text)
        version = fields.pop("layout")
        json.dumps(fields, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _damaged(path, "its header cannot be read") from None
    # The version first: another one may seal its header differently.
    if isinstance(version, int) and version != LAYOUT_VERSION:
        raise CheckpointError(
            f"{path} has memory layout {version}, this version of nested-lm reads {LAYOUT_VERSION}\n"
            f"  It was written by version {fields.get('written_by')}: use that, or read the documents again with "
            "`nested-lm memorize`."
        )
    if version is None or seal != xxhash.xxh3_128_hexdigest(text.encode()):
        raise _damaged(path, "its header was changed after it was written")
    try:
        header: MemoryHeader = _HEADERS.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{place} in its header: {first['msg'].lower()}") from None
    position = header.values.get("position")
    if type(position) is not int or not 0 <= position < _MOST_TOKENS:
        raise _damaged(path, f"position in its header is {position!r}, which is no number of tokens")
    return header


def num_streams(state: StreamState) -> int:
    """Rows of the batch that a state holds."""
    return int(next(iter(flatten(state).tensors.values())).shape[0])


def describe_bytes(count: int) -> str:
    """A size for people: `973.5 KiB`."""
    if count < 1024:
        return f"{count} bytes"
    size, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"


def _read_metadata(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there; make a memory file with `nested-lm memorize --checkpoint RUN FILE --memory {path}`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # whatever the library says of a file is damage of it
        raise _damaged(path, f"{error}") from error
    if _HEADER not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a memory: its metadata has no {_HEADER!r}; "
            "name a file that `nested-lm memorize` wrote"
        )
    return metadata[_HEADER]


def _read_tensors(path: Path, header: MemoryHeader) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: what safetensors returns may share the file's pages, which another process could replace.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except Exception as error:  # as above
        raise _damaged(path, f"{error}") from error
    found = tensors_hash(tensors)
    if found != header.tensors_hash:
        raise _damaged(path, f"its tensors have xxh3_128 {found}, its header says {header.tensors_hash}")
    return tensors


def _check_tensor(path: Path, name: str, tensor: Tensor | None, expected: Tensor, streams: int) -> None:
    """Compare with the state of a stream that has read nothing, whose dimensions of size 0 may grow."""
    if tensor is None or tensor.dtype != expected.dtype or tensor.ndim != expected.ndim:
        found = "missing" if tensor is None else f"a {type_name(tensor.dtype)} tensor of {tensor.ndim} dimensions"
        raise _damaged(path, f"{name} is {found}, its header says otherwise")
    wanted = (streams, *expected.shape[1:])
    if any(size not in (found, 0) for found, size in zip(tensor.shape, wanted, strict=True)):
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, this version of nested-lm makes {wanted}\n"
            "  Read the documents again with `nested-lm memorize`."
        )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or not a memory file: {found}\n"
        "  Copy it again from where it came, or read the documents again with `nested-lm memorize`."
    )
