"""A converted Llama is the original: logits, text, streams; its levels; and what is refused, leaving nothing behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_lm.checkpoint import find_checkpoint, load_model
from nested_lm.config.load import load_data, load_run
from nested_lm.conversion.convert import convert
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.reading.generation import generate
from nested_lm.train.run_folder import read_run_identity
from tests.conversion.conftest import SCALED

LIMIT = 1e-5  # relative to the largest logit, float32


def tokens(*shape, seed=1):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def converted(folder, output, *overrides, periods=(1024, 2048), **options):
    convert(str(folder), output, overrides, periods=periods, **options)
    return load_model(find_checkpoint(output), device="cpu")


@torch.no_grad()
def difference(original, loaded, ids):
    expected = original(ids).logits
    return ((loaded.model(ids).logits - expected).abs().max() / expected.abs().max()).item()


class TestTheSameModel:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"tie_word_embeddings": True},
            {"num_key_value_heads": 1},
            {"num_key_value_heads": None},
            {"rope_parameters": SCALED},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
            {"rms_norm_eps": 1e-2},
        ],
        ids=["untied", "tied", "one key head", "no sharing", "llama 3 angles", "base", "epsilon"],
    )
    def test_logits(self, make_llama, tmp_path, changes):
        original, folder = make_llama(**changes)
        loaded = converted(folder, tmp_path / "out")
        assert difference(original, loaded, tokens(2, 60)) < LIMIT
        assert (loaded.model.head is None) == changes.get("tie_word_embeddings", False)

    def test_logits_from_shards(self, make_llama, tmp_path):
        original, folder = make_llama(shard_size="40KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        assert difference(original, converted(folder, tmp_path / "out"), tokens(2, 40)) < LIMIT

    def test_bfloat16_is_kept_on_disk_and_exact_in_float32(self, make_llama, transformers, tmp_path):
        _, folder = make_llama(dtype=torch.bfloat16)
        original = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded = converted(folder, tmp_path / "out")
        stored = load_file(find_checkpoint(tmp_path / "out") / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
        assert difference(original, loaded, tokens(1, 40)) < LIMIT

    def test_greedy_text(self, make_llama, tmp_path):
        original, folder = make_llama()
        loaded, prompt = converted(folder, tmp_path / "out"), tokens(2, 9)
        settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
        expected = original.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 9:]
        options = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "generator": torch.Generator()}
        found = generate(loaded.model, prompt, max_new_tokens=30, **options).tokens
        assert torch.equal(found, expected)
        assert len(set(found[0].tolist())) > 5

    @pytest.mark.parametrize("cut", [1, 13, 39])
    def test_a_stream_cut_anywhere(self, make_llama, tmp_path, cut):
        original, folder = make_llama()
        loaded, ids = converted(folder, tmp_path / "out"), tokens(2, 40)
        with torch.no_grad():
            first = loaded.model(ids[:, :cut])
            second = loaded.model(ids[:, cut:], state=first.state)
            expected = original(ids).logits
        found = torch.cat([first.logits, second.logits], dim=1)
        assert ((found - expected).abs().max() / expected.abs().max()).item() < LIMIT

    def test_old_files_with_stored_frequencies_and_a_repeated_tied_head(self, make_llama, tmp_path):
        original, folder = make_llama(tie_word_embeddings=True)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors")
        assert difference(original, converted(folder, tmp_path / "out"), tokens(1, 20)) < LIMIT

    def test_the_older_way_to_write_rotary_angles(self, make_llama, change_config, tmp_path):
        original, folder = make_llama(rope_parameters=SCALED)
        scaling = {key: value for key, value in SCALED.items() if key not in ("rope_theta", "rope_type")}
        change_config(folder, rope_parameters=None, rope_theta=500_000.0, rope_scaling=scaling | {"type": "llama3"})
        assert difference(original, converted(folder, tmp_path / "out"), tokens(1, 50)) < LIMIT


class TestWhatIsWritten:
    def test_the_run_is_at_step_0_and_names_its_origin(self, make_llama, tmp_path):
        _, folder = make_llama()
        loaded = converted(folder, tmp_path / "out")
        assert (loaded.step, loaded.tokens, loaded.milestone) == (0, 0, None)
        origin = loaded.identity["converted_from"]
        assert (origin["name"], origin["revision"]) == (str(folder), None)
        assert set(origin["sha256"]) == {"config.json", "tokenizer.json", "model.safetensors"}
        assert loaded.identity["parameters"] == sum(parameter.numel() for parameter in loaded.model.parameters())
        assert read_run_identity(tmp_path / "out") == loaded.identity

    def test_presets_of_the_run_and_of_its_data_load(self, make_llama, tmp_path):
        _, folder = make_llama()
        loaded = converted(folder, tmp_path / "out")
        assert load_run(str(tmp_path / "out" / "config.resolved.yaml")) == loaded.config
        data = load_data(str(tmp_path / "out" / "data.yaml"))
        assert data == loaded.config.data
        assert data.tokenizer.path == str(tmp_path / "out" / "tokenizer.json")

    def test_documents_lie_between_the_tokens_that_config_json_names(self, make_llama, change_config, tmp_path):
        _, folder = make_llama()
        tokenizer = converted(folder, tmp_path / "out").tokenizer
        assert (tokenizer.start_of_text, tokenizer.end_of_text) == (300, 301)  # of several ends the first
        change_config(folder, eos_token_id=None)
        tokenizer = converted(folder, tmp_path / "other").tokenizer
        assert (tokenizer.start_of_text, tokenizer.end_of_text) == (300, 300)

    def test_levels_are_runs_of_layers_with_the_periods_given(self, make_llama, tmp_path):
        _, folder = make_llama()
        made = convert(str(folder), tmp_path / "out", periods=(1024, 4096, 8192))
        assert made.config.model.channel.periods == (1024, 4096, 8192)
        assert made.levels == (0, 0, 1, 2)
        roles = load_model(find_checkpoint(made.folder), device="cpu").model.parameter_roles()
        assert [roles[f"blocks.{layer}.channel.mlp.out.weight"].level for layer in range(4)] == [0, 0, 1, 2]

    def test_by_default_levels_update_every_1_4_and_16_steps(self, make_llama, tmp_path):
        _, folder = make_llama()
        made = convert(str(folder), tmp_path / "out", periods=None)
        step = made.config.train.step_tokens
        assert made.config.model.channel.periods == (step, 4 * step, 16 * step)
        assert made.config.train.context_length == 64
        _, shallow = make_llama(folder="shallow", num_hidden_layers=2)
        assert len(convert(str(shallow), tmp_path / "two", periods=None).config.model.channel.periods) == 2

    def test_overrides_change_the_assignment_and_the_training(self, make_llama, tmp_path):
        original, folder = make_llama()
        overrides = ["model.channel.assignment=[1,0,0,1]", "train.accumulation=1", "train.budget_tokens=600000"]
        made = convert(str(folder), tmp_path / "out", overrides, periods=(64, 128))
        assert made.levels == (1, 0, 0, 1)
        assert made.config.train.step_tokens == 64
        assert difference(original, load_model(find_checkpoint(made.folder), device="cpu"), tokens(1, 30)) < LIMIT


def damage_weights(change):
    def apply(folder, change_config):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def damage_config(**fields):
    return lambda folder, change_config: change_config(folder, **fields)


def damage_file(name, content):
    return lambda folder, change_config: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder, change_config: (folder / name).unlink()


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED = {
    "another type": (damage_config(model_type="mistral"), "model_type: Input should be 'llama', found 'mistral'"),
    "no type": (damage_config(model_type=None), "model_type: Field required"),
    "no width": (damage_config(hidden_size=None), "hidden_size: Field required"),
    "activation": (damage_config(hidden_act="gelu"), "hidden_act: Input should be 'silu', found 'gelu'"),
    "attention biases": (damage_config(attention_bias=True), "attention_bias: Input should be False, found True"),
    "MLP biases": (damage_config(mlp_bias=True), "mlp_bias: Input should be False"),
    "head width": (damage_config(head_dim=16), "head_dim 16 x num_attention_heads 4 is not hidden_size 32"),
    "quantised": (damage_config(quantization_config={"bits": 4}), "quantization_config: Input should be None"),
    "key heads": (damage_config(num_key_value_heads=3), "num_kv_heads 3 does not divide num_heads 4"),
    "rotary type": (
        damage_config(rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "rotary positions of type 'yarn' are not supported; supported are 'default' and 'llama3'",
    ),
    "old rotary type": (
        damage_config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        "type 'linear' are not supported",
    ),
    "rotary factor": (
        damage_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        "type 'llama3' need low_freq_factor, high_freq_factor",
    ),
    "partial rotation": (damage_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "no tokens around documents": (
        damage_config(bos_token_id=None, eos_token_id=None),
        "names neither bos_token_id nor eos_token_id",
    ),
    "unknown start token": (damage_config(bos_token_id=310), "names token 310 as the start or end of a document"),
    "start token that text may spell": (damage_config(bos_token_id=64), "spells 'a' is encoded as token 64"),
    "small embedding": (damage_config(vocab_size=302), "has 303 tokens, the embedding of the model 302"),
    "no JSON": (damage_file("config.json", b"{"), "config.json cannot be read"),
    "a list": (damage_file("config.json", b"[]"), "holds list, not a mapping"),
    "no config": (remove("config.json"), "config.json is missing: .* is not a Hugging Face checkpoint"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing; load the tokenizer with transformers"),
    "damaged tokenizer": (damage_file("tokenizer.json", b"{}"), "tokenizer.json is damaged"),
    "no weights": (remove("model.safetensors"), "weights are read from safetensors only"),
    "damaged weights": (damage_file("model.safetensors", b"\x10" * 100), "model.safetensors is damaged"),
    "missing tensor": (damage_weights(lambda w: w.pop(Q)), f"missing: {Q}\n"),
    "unknown tensor": (damage_weights(lambda w: w.update(bias=torch.zeros(2))), "unknown: bias\n"),
    "bias tensor": (
        damage_weights(lambda w: w.update({Q.replace("weight", "bias"): torch.zeros(32)})),
        "unknown: model.layers.1.self_attn.q_proj.bias",
    ),
    "shape": (
        damage_weights(lambda w: w.update({Q: torch.zeros(32, 16)})),
        r"of another shape: model.layers.1.self_attn.q_proj.weight: \[32, 16\], config.json means \[32, 32\]",
    ),
    "integers": (
        damage_weights(lambda w: w.update({Q: torch.zeros(32, 32, dtype=torch.int8)})),
        "is of type torch.int8; allowed are float32, bfloat16 and float16",
    ),
    "mixed types": (
        damage_weights(lambda w: w.update({Q: torch.zeros(32, 32, dtype=torch.bfloat16)})),
        "have different types",
    ),
    "not finite": (
        damage_weights(lambda w: w[Q].view(-1)[7:8].fill_(torch.inf)),
        "q_proj.weight has values that are not finite",
    ),
    "tied head that differs": (
        damage_config(tie_word_embeddings=True),
        "ties the head to the embedding, and lm_head.weight differs",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
    def test_a_source_that_cannot_be_converted_leaves_nothing(
        self, make_llama, change_config, tmp_path, damage, message
    ):
        _, folder = make_llama()
        damage(folder, change_config)
        with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
            converted(folder, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]
        assert "Traceback" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda index: index["weight_map"].update({Q: "../model.safetensors"}), "outside its folder"),
            (lambda index: index["weight_map"].update({Q: "model-9.safetensors"}), "model-9.safetensors is missing"),
            (lambda index: index["weight_map"].update(more=index["weight_map"][Q]), "do not hold: more"),
            (lambda index: index.clear(), "has no weight_map"),
        ],
        ids=["path", "file", "tensor", "empty"],
    )
    def test_a_damaged_index(self, make_llama, tmp_path, change, message):
        _, folder = make_llama(shard_size="40KB")
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=message):
            converted(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_output_in_use(self, make_llama, tmp_path):
        _, folder = make_llama()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        with pytest.raises(ConfigError, match="is not an empty folder"):
            converted(folder, tmp_path / "out")
        assert (tmp_path / "out" / "mine").read_text() == "kept"

    def test_an_override_of_the_architecture(self, make_llama, tmp_path):
        _, folder = make_llama()
        with pytest.raises(ConfigError, match=r"model\.mixer\.rope_base: 10000\.0 -> 5\.0"):
            converted(folder, tmp_path / "out", "model.mixer.rope_base=5.0")

    def test_levels_that_do_not_fit(self, make_llama, tmp_path):
        _, folder = make_llama()
        with pytest.raises(ConfigError, match="5 levels for 4 layers"):
            converted(folder, tmp_path / "out", periods=(1024,) * 5)
        with pytest.raises(ConfigError, match="is not a multiple of the 1024 tokens of one training step"):
            converted(folder, tmp_path / "out", periods=(1000,))

    def test_a_full_disk_leaves_nothing(self, make_llama, tmp_path, monkeypatch):
        from nested_lm import checkpoint

        _, folder = make_llama()
        monkeypatch.setattr(checkpoint.Disk, "free_bytes", lambda self, path: 0)
        with pytest.raises(CheckpointError, match="0 are free"):
            converted(folder, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


class TestHub:
    def test_a_name_is_downloaded_and_its_commit_recorded(self, make_llama, tmp_path, monkeypatch):
        import huggingface_hub

        _, folder = make_llama(folder="0123abc")
        asked = {}

        def snapshot_download(name, **options):
            asked.update(options, name=name)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.chdir(tmp_path)
        loaded = converted("somebody/llama", tmp_path / "out", revision="main")
        assert (asked["name"], asked["revision"]) == ("somebody/llama", "main")
        assert loaded.identity["converted_from"]["revision"] == "0123abc"
        assert not any("*" in pattern and pattern != "model-*.safetensors" for pattern in asked["allow_patterns"])

    def test_a_name_that_is_neither(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="no/such-model is no folder, and cannot be loaded from the hub"):
            convert("no/such-model", tmp_path / "out", periods=None)
        with pytest.raises(CheckpointError, match="a b c is no folder"):
            convert("a b c", tmp_path / "out", periods=None)

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(ConfigError, match=r"pip install .* -e '\.\[hf\]'"):
            convert("no/such-model", tmp_path / "out", periods=None)

    def test_a_revision_of_a_folder(self, tmp_path):
        with pytest.raises(ConfigError, match="--revision main is for the hub"):
            convert(str(tmp_path), tmp_path / "out", periods=None, revision="main")
