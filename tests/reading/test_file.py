"""Memory files: bit-exact for every model; refused for any other model, layout or content; never half-written."""

import json
import os

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nested_lm.errors import CheckpointError, DataError, NumericsError
from nested_lm.nn.state import StreamState, iterate_tensors
from nested_lm.reading.identity import tensors_hash
from nested_lm.reading.memory_file import describe_bytes, load_memory, num_streams, read_header, save_memory
from nested_lm.reading.tree import flatten, rebuild
from tests.reading.models import PARTS, build, identity_of, tokens

HEADER = "nested_lm_memory"

every_model = pytest.mark.parametrize("name", PARTS)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path):
    """A model, its identity, a state it made, and the state's file."""
    model = build("hope", torch.float32)
    identity, state = identity_of(model), model(tokens(2, 13)).state
    save_memory(tmp_path / "m", state, identity)
    return model, identity, state, tmp_path / "m"


def all_tensors(state):
    return iterate_tensors((state.layers, state.in_context))


def same_bits(one, other):
    return [
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in zip(all_tensors(one), all_tensors(other), strict=True)
    ]


def rewrite(path, change):
    """Write a file again with a changed header that has the right seal."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER].partition("\n")[2])
    change(header, tensors)
    text = json.dumps(header)
    save_file(tensors, path, {HEADER: f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}"})


def test_a_state_that_is_not_finite_is_not_stored(saved):
    _, identity, state, path = saved
    before = path.read_bytes()
    spoiled = state.map(lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor)
    with pytest.raises(NumericsError, match=r"not finite: layer 0, memory\.border\.inner(?s:.*)Nothing was written"):
        save_memory(path, spoiled, identity)
    assert path.read_bytes() == before


class TestRoundTrip:
    @every_model
    @pytest.mark.parametrize("length", [0, 11, 16])
    def test_every_bit_comes_back_and_the_stream_goes_on(self, name, length, tmp_path):
        model = build(name)
        state = model(tokens(2, length)).state if length else model.initial_state(2)
        save_memory(tmp_path / "m", state, identity_of(model))
        loaded = load_memory(tmp_path / "m", model, identity_of(model))
        assert all(same_bits(loaded, state))
        assert (loaded.position, loaded.packed) == (length, False)
        assert flatten(loaded).form == flatten(state).form
        more = tokens(2, 21, seed=1)
        assert torch.equal(model(more, state=loaded).logits, model(more, state=state).logits)

    def test_a_packed_state(self, tmp_path):
        model, resets = build("transformer"), torch.zeros(1, 9, dtype=torch.bool)
        resets[0, 5] = True
        state = model(tokens(1, 9), resets=resets).state
        save_memory(tmp_path / "m", state, identity_of(model))
        loaded = load_memory(tmp_path / "m", model, identity_of(model))
        assert loaded.packed
        more = tokens(1, 6, seed=1)
        assert torch.equal(model(more, state=loaded).logits, model(more, state=state).logits)

    def test_a_frozen_state(self, tmp_path):
        model = build("hope")
        state = model(tokens(1, 9)).state.freeze()
        save_memory(tmp_path / "m", state, identity_of(model))
        assert load_memory(tmp_path / "m", model, identity_of(model)).frozen

    def test_special_values_survive(self, tmp_path):
        model = build("hope", torch.float32)
        state = model(tokens(1, 8)).state
        odd = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, -0.0, 1e-45])
        state = state.map(lambda tensor: tensor.flatten().index_copy(0, torch.arange(4), odd).view_as(tensor))
        save_memory(tmp_path / "m", state, identity_of(model))
        assert all(same_bits(load_memory(tmp_path / "m", model, identity_of(model)), state))

    def test_the_same_state_is_the_same_file(self, saved, tmp_path):
        _, identity, state, path = saved
        save_memory(tmp_path / "again", state, identity)
        assert (tmp_path / "again").read_bytes() == path.read_bytes()

    def test_a_state_with_gradients_is_stored_without(self, tmp_path):
        model = build("hope")
        with torch.enable_grad():
            state = model(tokens(1, 5)).state
        save_memory(tmp_path / "m", state, identity_of(model))
        loaded = load_memory(tmp_path / "m", model, identity_of(model))
        assert not any(tensor.requires_grad for tensor in all_tensors(loaded))

    def test_numbers_and_other_leaves(self):
        state = StreamState((((torch.ones(1, 2), 3, 0.1, True, "x"), None),), position=0, packed=False, model=None)
        flat = flatten(state)
        template = StreamState((((torch.zeros(1, 2), 0, 0.0, False, ""), None),), position=0, packed=False, model=None)
        assert rebuild(template, flat.tensors, json.loads(json.dumps(flat.values))) == state
        with pytest.raises(TypeError, match=r"layers\.0 is a list; a state holds"):
            flatten(StreamState(([],), position=0, packed=False, model=None))

    def test_header(self, saved):
        model, identity, state, path = saved
        header = read_header(path)
        assert (header.position, header.streams, header.state_bytes) == (13, 2, state.num_bytes())
        assert header.model == identity
        assert header.model.settings == model.config.model_dump(mode="json")
        # Twelve tensors, their names and the header beside the numbers themselves.
        assert path.stat().st_size - header.state_bytes < 12_000


class TestForks:
    def test_a_fork_of_a_loaded_state_is_independent(self, saved):
        model, identity, _, path = saved
        state = load_memory(path, model, identity)
        before = [tensor.clone() for tensor in all_tensors(state)]
        forks = state.select(torch.tensor([0, 0, 1]))
        assert num_streams(forks) == 3
        ids = tokens(3, 9, seed=5)
        moved = model(ids, state=forks).state
        assert not any(torch.equal(a[:1], b[:1]) for a, b in zip(all_tensors(moved), before, strict=True))
        for fork in all_tensors(forks):
            fork.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip(all_tensors(state), before, strict=True))

    def test_a_loaded_state_does_not_depend_on_the_file(self, saved):
        model, identity, state, path = saved
        loaded = load_memory(path, model, identity)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert all(same_bits(loaded, state))


class TestRefusals:
    def refused(self, path, model, identity, *parts):
        with pytest.raises(CheckpointError) as caught:
            load_memory(path, model, identity)
        message = str(caught.value)
        assert all(part in message for part in (str(path), *parts)), message

    def test_other_weights_by_hash(self, saved):
        _, identity, _, path = saved
        other = build("hope", torch.float32, seed=1)
        hashes = identity.weights_hash[:16], identity_of(other).weights_hash[:16]
        assert hashes[0] != hashes[1]
        self.refused(path, other, identity_of(other), "another model (a run, step 3)", "weights", *hashes, "memorize")

    def test_one_bit_of_one_weight_is_another_model(self, saved):
        model, _, _, path = saved
        weight = model.blocks[1].mixer.start_inner.data.view(torch.int32)
        weight.view(-1)[0] ^= 1
        self.refused(path, model, identity_of(model), "weights")

    def test_another_configuration_by_hash_and_setting(self, saved):
        _, identity, _, path = saved
        other = build("hope", torch.float32, norm_epsilon=1e-5)
        self.refused(
            path,
            other,
            identity_of(other),
            identity.config_hash,
            identity_of(other).config_hash,
            "norm_epsilon is 1e-06 there and 1e-05 here",
        )

    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_another_backend_reads_it(self, saved, backend):
        model, _, state, path = saved
        mixer = model.config.mixer.model_dump(mode="json") | {"backend": backend}
        other = build("hope", torch.float32, mixer=mixer)
        loaded = load_memory(path, other, identity_of(other))
        assert all(same_bits(loaded, state))

    def test_a_file_of_a_version_without_a_field_or_with_another_hash(self, saved):
        model, identity, state, path = saved

        def change(header, _tensors):
            header["model"]["config_hash"] = "0" * 16
            del header["model"]["settings"]["mixer"]["backend"]

        rewrite(path, change)
        assert all(same_bits(load_memory(path, model, identity), state))

    def test_another_mixer(self, saved):
        other = build("transformer", torch.float32)
        self.refused(saved[3], other, identity_of(other), 'mixer.kind is "self_modifying" there and "attention" here')

    def test_another_tokenizer_by_hash(self, saved):
        model, _, _, path = saved
        self.refused(path, model, identity_of(model, "u" * 64), "t" * 16, "u" * 16, "tokenizer")

    def test_another_dtype(self, saved):
        model, path = saved[0].double(), saved[3]
        self.refused(path, model, identity_of(model), "computed in float32, this one computes in float64")

    def test_a_state_of_another_dtype_than_its_model(self, tmp_path):
        model = build("hope", torch.float32)
        state = model(tokens(1, 8)).state.map(lambda tensor: tensor.bfloat16())
        save_memory(tmp_path / "m", state, identity_of(model))
        self.refused(tmp_path / "m", model, identity_of(model), "bfloat16 tensor", "float32 tensor", "layers.0")

    def test_an_older_form_of_the_state_by_hash_and_place(self, saved):
        model, identity, _, path = saved
        here = read_header(path).form_hash

        def older(header, tensors):
            header["form"] = {k: v for k, v in header["form"].items() if not k.startswith("layers.1.memory.momentum")}
            header["form_hash"] = "0123456789abcdef"

        rewrite(path, older)
        expected = "layers.1.memory.momentum is nothing there and None here"
        self.refused(path, model, identity, "0123456789abcdef", here, expected, "version")

    def test_another_layout(self, saved):
        model, identity, _, path = saved
        rewrite(path, lambda header, tensors: header.update(layout=0, written_by="0.0.7"))
        self.refused(path, model, identity, "memory layout 0", "reads 1", "written by version 0.0.7")

    def test_a_tensor_of_another_shape(self, tmp_path):
        model = build("hope", torch.float32)
        narrow = model(tokens(1, 8)).state.map(lambda tensor: tensor[..., :3])
        save_memory(tmp_path / "m", narrow, identity_of(model))
        self.refused(tmp_path / "m", model, identity_of(model), "layers.0.memory.border.inner", "(1, 2, 5, 6, 3)")

    def test_any_changed_byte_of_the_tensors_is_noticed(self, saved):
        model, identity, _, path = saved
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for at in (begin, (begin + len(content)) // 2, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            self.refused(path, model, identity, "damaged", "xxh3_128")

    def test_a_changed_header_is_noticed(self, saved):
        model, identity, _, path = saved
        content = path.read_bytes()
        changed = content.replace(b'\\"position\\": 13', b'\\"position\\": 14')
        assert changed != content
        path.write_bytes(changed)
        self.refused(path, model, identity, "its header was changed")

    @pytest.mark.parametrize("kept", [0, 5, 300, -1])
    def test_a_file_that_is_cut_short(self, saved, kept):
        model, identity, _, path = saved
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(path, model, identity, "damaged or not a memory file")

    def test_what_is_no_memory_file(self, saved, tmp_path):
        model, identity, _, _ = saved
        (tmp_path / "text").write_text("not a memory, but a text that is longer than the length of a header")
        self.refused(tmp_path / "text", model, identity, "damaged or not a memory file")
        save_file({"a": torch.ones(2)}, tmp_path / "other")
        self.refused(tmp_path / "other", model, identity, "not a memory", "nested-lm memorize")
        self.refused(tmp_path / "absent", model, identity, "is not there", "nested-lm memorize")

    def test_text_in_the_place_of_the_header(self, saved):
        model, identity, _, path = saved
        save_file(load_file(path), path, {HEADER: "seal\n[1"})
        self.refused(path, model, identity, "its header cannot be read")

    @pytest.mark.parametrize(
        "change",
        [
            lambda header, tensors: header.update(streams=10**300),
            lambda header, tensors: header.update(streams=3),
            lambda header, tensors: header.update(streams=-1),
            lambda header, tensors: header.update(streams="2"),
            lambda header, tensors: header.update(state_bytes=None),
            lambda header, tensors: header.update(written_by="\ud800"),
            lambda header, tensors: header.update(form=["x"]),
            lambda header, tensors: header.update(values={}),
            lambda header, tensors: header.update(values=7),
            lambda header, tensors: header["values"].update(position="13"),
            lambda header, tensors: header["values"].update(position=-13),
            lambda header, tensors: header["values"].update(position=10**30),
            lambda header, tensors: header["values"].update(packed=3),
            lambda header, tensors: header["values"].pop("frozen"),
            lambda header, tensors: header.pop("tensors_hash"),
            lambda header, tensors: header["model"].update(label="\udcff"),
            lambda header, tensors: header["model"].update(settings=[]),
            lambda header, tensors: header.update(model=None),
            lambda header, tensors: header.update(layout=None),
            lambda header, tensors: tensors.pop(next(iter(tensors))),
            lambda header, tensors: tensors.update({next(iter(tensors)): torch.zeros(2)}),
            lambda header, tensors: tensors.update({name: t.double() for name, t in tensors.items()}),
            lambda header, tensors: tensors.update({name: t[:1].clone() for name, t in tensors.items()}),
        ],
    )
    def test_a_sealed_header_that_says_nonsense_is_one_error(self, saved, change):
        model, identity, _, path = saved

        def forge(header, tensors):
            change(header, tensors)
            header["tensors_hash"] = tensors_hash(tensors) if "tensors_hash" in header else None

        rewrite(path, forge)
        self.refused(path, model, identity)

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, "1" * 5_000, "null", '{"layout": 1}', '{"layout": 1, "model": {}}']
    )
    def test_a_sealed_text_that_is_no_header_is_one_error(self, saved, text):
        model, identity, _, path = saved
        save_file(load_file(path), path, {HEADER: f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}"})
        self.refused(path, model, identity, "damaged")


class TestWriting:
    @pytest.mark.parametrize("operation", ["fsync", "replace"])
    def test_a_write_that_is_cut_off_leaves_the_old_file(self, saved, monkeypatch, operation):
        model, identity, state, path = saved
        old = path.read_bytes()

        def killed(*_):
            raise KeyboardInterrupt

        if operation == "fsync":
            monkeypatch.setattr(os, "fsync", killed)
        else:
            monkeypatch.setattr(type(path), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_memory(path, model(tokens(2, 9), state=state).state, identity)
        monkeypatch.undo()
        assert path.read_bytes() == old
        assert all(same_bits(load_memory(path, model, identity), state))

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, saved, monkeypatch):
        model, identity, state, path = saved
        old = path.read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="no space left"):
            save_memory(path, model(tokens(2, 9), state=state).state, identity)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == old


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (996_864, "973.5 KiB"), (3 << 30, "3.0 GiB")],
)
def test_sizes_for_people(count, text):
    assert describe_bytes(count) == text
