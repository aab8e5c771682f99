"""Llama's tensors under our names. Values and types stay as they are; only q, k, v and gate, up are joined.

Shapes: D model width, F hidden units of the MLP, V vocabulary.
"""

import re
from contextlib import ExitStack
from pathlib import PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nested_lm.config.model import ModelConfig
from nested_lm.conversion.source import INDEX, WEIGHTS, Source
from nested_lm.errors import CheckpointError

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Old checkpoints store the rotary frequencies, which follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_weights(source: Source, model: ModelConfig) -> dict[str, Tensor]:
    """Read all tensors of a Llama, check that they are exactly those of `model`, and name them as we do.

    Raises:
        CheckpointError: files that are missing or damaged; tensors that are missing, unknown, of another shape or of
            a type that is no plain float; values that are not finite; a stored head that differs from the embedding
            it should be tied to.
    """
    with ExitStack() as stack:
        files = _open(source, stack)
        _check_names(source, {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}, model)
        return _converted(source, files, model)


def weight_files(source: Source) -> list[str]:
    """Names of the files that hold the weights.

    Raises:
        CheckpointError: there are none in the safetensors format, or the index is damaged.
    """
    if (source.folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (source.folder / INDEX).is_file():
        raise CheckpointError(
            f"{source.folder} has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors only. Load the "
            "model with transformers and save it with save_pretrained, which writes them"
        )
    names = sorted(set(_weight_map(source).values()))
    for name in names:
        if not isinstance(name, str) or PurePath(name).name != name:
            raise CheckpointError(f"{source.folder / INDEX} names a file {name!r} outside its folder")
    return names


def _weight_map(source: Source) -> dict[str, str]:
    found = source.document(INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{source.folder / INDEX} has no weight_map; copy it again from where it came")
    return found


def _open(source: Source, stack: ExitStack) -> dict[str, Any]:
    """Open every file; return for each tensor the file that holds it."""
    holders: dict[str, Any] = {}
    for name in weight_files(source):
        path = source.folder / name
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; copy it again from where it came") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; copy it again from where it came") from error
        holders |= dict.fromkeys(file.keys(), file)
    if (source.folder / WEIGHTS).is_file():
        return holders
    missing = sorted(set(_weight_map(source)) - set(holders))
    if missing:
        raise CheckpointError(
            f"{source.folder / INDEX} lists tensors that its files do not hold: {_some(missing)}; "
            "copy the files again from where they came"
        )
    return holders


def _expected(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Llama's names and shapes of the tensors of a model."""
    width, hidden = model.width, model.channel.hidden  # type: ignore[union-attr]  # made by LlamaConfig
    keys = width // model.mixer.num_heads * model.mixer.key_heads  # type: ignore[union-attr]
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (model.vocab_size, width), "model.norm.weight": (width,)}
    if not model.tie_embeddings:
        shapes[_HEAD] = (model.vocab_size, width)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (keys, width),
            f"{prefix}self_attn.v_proj.weight": (keys, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{prefix}mlp.gate_proj.weight": (hidden, width),
            f"{prefix}mlp.up_proj.weight": (hidden, width),
            f"{prefix}mlp.down_proj.weight": (width, hidden),
        }
    return shapes


def _check_names(source: Source, found: dict[str, tuple[int, ...]], model: ModelConfig) -> None:
    expected = _expected(model)
    known = set(expected) | ({_HEAD} if model.tie_embeddings else set())
    missing = sorted(set(expected) - set(found))
    unknown = sorted(name for name in set(found) - known if not _DERIVED.fullmatch(name))
    reshaped = [
        f"{name}: {list(found[name])}, config.json means {list(expected[name])}"
        for name in sorted(set(expected) & set(found))
        if found[name] != expected[name]
    ]
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"the weights in {source.folder} are not those of the Llama that its config.json describes\n"
            f"  missing: {_some(missing)}\n"
            f"  unknown: {_some(unknown)}\n"
            f"  of another shape: {_some(reshaped)}\n"
            "  Copy the checkpoint again, or save the plain model (adapters merged) with save_pretrained."
        )


def _converted(source: Source, files: dict[str, Any], model: ModelConfig) -> dict[str, Tensor]:
    def take(*names: str) -> Tensor:
        parts = [_tensor(source, files[name], name) for name in names]
        if len({part.dtype for part in parts}) > 1:
            raise CheckpointError(f"{source.folder}: {', '.join(names)} have different types; save them in one type")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    tensors = {"embedding.weight": take(_EMBEDDING), "norm.weight": take("model.norm.weight")}
    if not model.tie_embeddings:
        tensors["head.weight"] = take(_HEAD)
    elif _HEAD in files and not torch.equal(take(_HEAD), tensors["embedding.weight"]):
        raise CheckpointError(
            f"config.json in {source.folder} ties the head to the embedding, and {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false if the stored head is meant"
        )
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        attention = [f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"]
        tensors |= {
            f"{ours}norm.weight": take(f"{theirs}input_layernorm.weight"),
            f"{ours}mixer.qkv.weight": take(*attention),
            f"{ours}mixer.out.weight": take(f"{theirs}self_attn.o_proj.weight"),
            f"{ours}channel.norm.weight": take(f"{theirs}post_attention_layernorm.weight"),
            f"{ours}channel.mlp.gate_and_in.weight": take(
                f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"
            ),
            f"{ours}channel.mlp.out.weight": take(f"{theirs}mlp.down_proj.weight"),
        }
    return tensors


def _tensor(source: Source, file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype not in _TYPES:
        raise CheckpointError(
            f"{source.folder}: {name} is of type {tensor.dtype}; allowed are float32, bfloat16 and float16. Save the "
            "model without quantisation"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{source.folder}: {name} has values that are not finite; the model cannot be used")
    return tensor


def _some(names: list[str], limit: int = 5) -> str:
    """List a few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
