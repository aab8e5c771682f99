import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nested_lm.conversion import convert as module

TEXT = "a small text about a small model that reads other small texts, again and again, until its memory is full; " * 4
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 300,
    "eos_token_id": [301, 302],
    "initializer_range": 0.15,  # far from uniform predictions, so that a wrong one shows
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer of 303 tokens in the manner of Llama 3: text first, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer=trainer)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    assert tokenizer.get_vocab_size() == 303
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def composed_once():
    """Presets without overrides, each composed once for all tests: Hydra takes most of the time of a conversion."""
    return {name: functools.cache(getattr(module, name)) for name in ("compose_preset", "load_data")}


@pytest.fixture(autouse=True)
def _quick_presets(composed_once, monkeypatch):
    for name, cached in composed_once.items():
        monkeypatch.setattr(module, name, lambda *arguments, cached=cached: copy.deepcopy(cached(*arguments)))


@pytest.fixture(scope="session")
def transformers():
    """The package, or a skipped test."""
    return pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[dev]'")


@pytest.fixture
def make_llama(tmp_path, transformers) -> Callable[..., tuple]:
    """Make a randomly initialised Llama and its folder: `make_llama(shards=3, hidden_size=48)`."""
    import torch

    def make(*, folder: str = "llama", shard_size: str = "1GB", dtype=torch.float32, seed: int = 0, **changes):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | changes))).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm in the wrong place
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        path = tmp_path / folder
        model.save_pretrained(path, max_shard_size=shard_size)
        write_tokenizer(path / "tokenizer.json")
        return model, path

    return make


@pytest.fixture
def change_config() -> Callable[..., None]:
    """Change fields of a config.json; None removes one."""

    def change(folder: Path, **fields) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change
