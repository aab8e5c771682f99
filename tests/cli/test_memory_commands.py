"""`nested-lm memorize`, `score` and `generate --memory` on a checkpoint of a model that was never trained."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nested_lm.checkpoint import load_model, write_checkpoint
from nested_lm.cli.main import app
from nested_lm.config.load import config_hash, parse_run
from nested_lm.nn.loss import token_losses
from nested_lm.nn.model import LanguageModel
from nested_lm.reading import calls
from nested_lm.reading.generation import generate
from nested_lm.reading.memory_file import read_header
from nested_lm.reading.trained import TrainedModel
from nested_lm.storage.lock import own_file

ROOT = Path(__file__).resolve().parents[2]
FIRST = "the union of these states shall keep its army and navy in peace"
SECOND = "while congress reads this message on the revenue and the commerce of nations, ünd so weiter"
PROMPT = "our citizens trade"
ROUNDING = 1e-5
"""Relative to the largest weight, float32: the same sums, cut differently. Measured: 5e-6."""
MODELS = {
    "hope": {
        "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 4},
        "channel": {"kind": "cms", "levels": [{"period_tokens": 64, "expansion": 1.0}]},
    },
    "transformer": {
        "mixer": {"kind": "attention", "num_heads": 2},
        "channel": {"kind": "swiglu", "expansion": 2.0},
    },
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tiny_data):
    """Write a run folder with one checkpoint: `make_checkpoint("hope", seed=1)`."""
    root = tmp_path_factory.mktemp("runs")

    def make(kind, *, seed=0, step=3):
        config = parse_run(
            {
                "name": kind,
                "output_dir": "unused",
                "seed": seed,
                "data": tiny_data.config.model_dump(mode="json"),
                "model": {"vocab_size": 320, "width": 16, "num_layers": 2, **MODELS[kind]},
                "train": {
                    "budget_tokens": 1024,
                    "context_length": 16,
                    "batch_size": 4,
                    "stream": {"kind": "shuffled"},
                    "optimizer": {"kind": "adamw", "rate": 1e-3},
                    "schedule": {"kind": "cosine", "warmup_tokens": 0},
                    "evaluate_every_tokens": 512,
                    "evaluate_tokens": 128,
                    "checkpoints": {"every_tokens": 512},
                    "device": "cpu",
                },
                "eval": {"batch_size": 4, "bootstrap_samples": 100},
            },
            "test",
        )
        model = LanguageModel(config.model)
        model.initialise(seed)
        with torch.no_grad():
            model.embedding.weight.mul_(20.0)  # predictions that depend strongly on what was read
        tokenizer = tiny_data.folder / "tokenizer.json"
        manifest = json.loads((tiny_data.folder / "manifest.json").read_text())
        folder = root / f"{kind}-{seed}"
        identity = {"run_id": "r", "name": kind, "seed": seed, "parameters": 1, "data_hash": "d", "commit": None}
        identity |= {"tokenizer_hash": manifest["tokenizer"]["sha256"], "config_hash": config_hash(config)}
        write_checkpoint(
            folder / "checkpoints" / f"step-{step:08d}",
            tensors={"model": model.state_dict()},
            documents={
                "config.json": config.model_dump(mode="json"),
                "run.json": identity,
                "train_state.json": {"step": step, "tokens": 192},
            },
            extra_files={"tokenizer.json": tokenizer},
            config_hash=config_hash(config),
        )
        return folder

    return make


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The working folder, with one text file a document, and both as JSON lines."""
    monkeypatch.chdir(tmp_path)
    Path("first.txt").write_text(FIRST)
    Path("second.txt").write_text(SECOND)
    Path("both.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (FIRST, SECOND)))
    return tmp_path


@pytest.fixture
def run(texts):
    def invoke(*arguments, stdin=None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture
def memorize(run, make_checkpoint):
    def invoke(*arguments, kind="hope", seed=0, stdin=None):
        found = run("memorize", "--checkpoint", make_checkpoint(kind, seed=seed), *arguments, stdin=stdin)
        assert found.exit_code == 0, found.output
        return found.stdout

    return invoke


def loaded(folder):
    return load_model(next((folder / "checkpoints").iterdir()), device="cpu")


def stream(checkpoint, *texts):
    """Tokens of documents as they are read."""
    tokenizer = checkpoint.tokenizer
    return torch.tensor([[token for text in texts for token in [tokenizer.start_of_text, *tokenizer.encode(text)]]])


def identity(checkpoint):
    return TrainedModel.of(checkpoint).identify()


def open_memory(path, checkpoint):
    trained = TrainedModel.of(checkpoint)
    trained.load_memory(path)
    return trained.memory


def kept(path):
    return path.read_bytes(), path.stat().st_mtime_ns


class TestMemorize:
    def test_what_is_read_and_said(self, memorize, make_checkpoint, texts):
        said = memorize("first.txt", "second.txt", "--memory", "m")
        checkpoint = loaded(make_checkpoint("hope"))
        inputs = stream(checkpoint, FIRST, SECOND)
        with torch.no_grad():
            output = checkpoint.model(inputs)
            targets = torch.cat([inputs[:, 1:], torch.tensor([[checkpoint.tokenizer.end_of_text]])], dim=1)
            nats = token_losses(output.logits, targets).sum().item()
        size = len((FIRST + SECOND).encode())
        assert f"read 2 documents, {inputs.shape[1]} tokens, {size} bytes: " in said
        assert f"{nats / math.log(2) / size:.4f} bits per byte" in said
        assert "tokens/s" in said
        header = read_header(texts / "m")
        assert header.position == inputs.shape[1]
        assert header.model == identity(checkpoint)
        assert f"state {output.state.num_bytes() / 1024:.1f} KiB (constant)" in said
        state = open_memory(texts / "m", checkpoint)
        torch.testing.assert_close(
            state.layers[1].memory.current.inner, output.state.layers[1].memory.current.inner, rtol=1e-4, atol=1e-6
        )

    def test_files_standard_input_and_json_lines_hold_the_same_texts(self, memorize, texts):
        memorize("first.txt", "second.txt", "--memory", "a")
        memorize("first.txt", "-", "--memory", "b", stdin=SECOND)
        memorize("both.jsonl", "--memory", "c")
        (texts / "named.jsonl").write_text((texts / "both.jsonl").read_text().replace('"text"', '"body"'))
        memorize("named.jsonl", "--memory", "d", "--text-field", "body")
        contents = {(texts / name).read_bytes() for name in "abcd"}
        assert len(contents) == 1

    def test_reading_on_is_reading_at_once(self, memorize, texts, make_checkpoint):
        memorize("first.txt", "--memory", "m")
        one = read_header(texts / "m").position
        said = memorize("second.txt", "--memory", "m", "--continue")
        memorize("first.txt", "second.txt", "--memory", "whole")
        assert one < read_header(texts / "m").position == read_header(texts / "whole").position
        assert f"memory in m: {read_header(texts / 'whole').position} tokens" in said
        checkpoint = loaded(make_checkpoint("hope"))
        a, b = (open_memory(texts / name, checkpoint) for name in ("m", "whole"))
        for one, other in zip(a.layers, b.layers, strict=True):
            difference = (one.memory.current.inner - other.memory.current.inner).abs().max()
            assert difference < ROUNDING * other.memory.current.inner.abs().max()

    def test_a_memory_is_not_overwritten_silently(self, memorize, run, make_checkpoint, texts):
        memorize("first.txt", "--memory", "m")
        before = kept(texts / "m")
        found = run("memorize", "--checkpoint", make_checkpoint("hope"), "second.txt", "--memory", "m")
        assert found.exit_code == 2
        assert "m exists; read on with --continue, start again with --overwrite" in found.stderr
        assert kept(texts / "m") == before
        memorize("second.txt", "--memory", "m", "--overwrite")
        memorize("second.txt", "--memory", "alone")
        assert (texts / "m").read_bytes() == (texts / "alone").read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["first.txt", "--memory", "m", "--continue"], "there is nothing to continue"),
            (["first.txt", "--memory", "m", "--continue", "--overwrite"], "give one of them"),
            (["absent.txt", "--memory", "m"], "absent.txt is not there"),
            (["first.pdf", "--memory", "m"], "its ending is none of .txt, .jsonl"),
            ([".", "--memory", "m"], "is a folder"),
            (["-", "first.txt", "-", "--memory", "m"], "name it once"),
            (["bad.jsonl", "--memory", "m"], "bad.jsonl:2: no text: no field 'text'; fields: 'body'"),
            (["empty.jsonl", "--memory", "m"], "no document found"),
            (["-", "--memory", "m"], "standard input: not utf8: byte 1 is 0xff"),
        ],
    )
    def test_what_cannot_be_read_writes_nothing(self, run, make_checkpoint, texts, arguments, message):
        (texts / "first.pdf").write_bytes(b"%PDF")
        (texts / "bad.jsonl").write_text('{"text": "good"}\n{"body": "not"}\n')
        (texts / "empty.jsonl").write_text("\n")
        found = run("memorize", "--checkpoint", make_checkpoint("hope"), *arguments, stdin=b"a\xff")
        assert found.exit_code == 2
        assert message in found.stderr
        assert not (texts / "m").exists()

    def test_two_writers_of_one_memory_do_not_meet(self, memorize, run, make_checkpoint, texts):
        memorize("first.txt", "--memory", "m")
        before = kept(texts / "m")
        reads = ("memorize", "second.txt", "--memory", "m", "--continue", "--checkpoint", make_checkpoint("hope"))
        writes = ("generate", make_checkpoint("hope"), "--prompt", PROMPT, "--memory", "m", "--update-memory")
        with own_file(texts / "m", activity="another reading"):
            for arguments in (reads, writes):
                found = run(*arguments)
                assert found.exit_code == 2
                assert "another reading" in found.stderr
        assert kept(texts / "m") == before

    def test_a_cache_that_grows_says_so_and_is_limited(self, memorize, run, make_checkpoint, texts):
        said = memorize("first.txt", "--memory", "m", kind="transformer")
        assert "grows with every token this model reads" in said
        small = read_header(texts / "m").state_bytes
        memorize("second.txt", "--memory", "m", "--continue", kind="transformer")
        assert read_header(texts / "m").state_bytes > 2 * small
        before = kept(texts / "m")
        (texts / "long.txt").write_text(FIRST * 200)
        limits = ["--continue", "--max-state-mib", 1]
        found = run("memorize", "--checkpoint", make_checkpoint("transformer"), "long.txt", "--memory", "m", *limits)
        assert found.exit_code == 2
        assert "the limit is 1.0 MiB (--max-state-mib); nothing was written" in found.stderr
        assert kept(texts / "m") == before

    def test_killed_while_reading_the_old_memory_stays(self, memorize, make_checkpoint, texts):
        memorize("first.txt", "--memory", "m")
        before = kept(texts / "m")
        arguments = ["memorize", "--checkpoint", str(make_checkpoint("hope")), "-", "--memory", "m", "--continue"]
        code = "from nested_lm.cli.main import main; main()"
        with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, cwd=texts) as process:
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert kept(texts / "m") == before
        assert sorted(path.name for path in texts.iterdir()) == ["both.jsonl", "first.txt", "m", "second.txt"]


class TestGenerate:
    @pytest.mark.parametrize("kind", MODELS)
    def test_memory_and_prompt_are_one_pass_over_text_and_prompt(
        self, kind, memorize, run, make_checkpoint, texts, monkeypatch
    ):
        monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
        memorize("both.jsonl", "--memory", "m", kind=kind)
        before = kept(texts / "m")
        arguments = ["generate", make_checkpoint(kind), "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 12]
        said = run(*arguments, "--memory", "m")
        assert said.exit_code == 0, said.output
        checkpoint = loaded(make_checkpoint(kind))
        tokens = stream(checkpoint, FIRST, SECOND, PROMPT)
        length = tokens.shape[1]
        with torch.no_grad():
            for _ in range(12):
                tokens = torch.cat([tokens, checkpoint.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        new = tokens[0, length:].tolist()
        assert checkpoint.tokenizer.end_of_text not in new
        assert said.stdout == PROMPT + checkpoint.tokenizer.decode(new) + "\n"
        assert kept(texts / "m") == before
        assert run(*arguments).stdout != said.stdout

    def test_the_memory_is_updated_on_request(self, memorize, run, make_checkpoint, texts):
        memorize("first.txt", "--memory", "m")
        checkpoint = loaded(make_checkpoint("hope"))
        plain = generate(
            checkpoint.model,
            stream(checkpoint, FIRST, PROMPT),
            max_new_tokens=6,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            generator=torch.Generator(),
        ).tokens[0]
        arguments = ["generate", make_checkpoint("hope"), "--prompt", PROMPT, "--temperature", 0]
        assert run(*arguments, "--max-new-tokens", 6, "--memory", "m", "--update-memory").exit_code == 0
        with torch.no_grad():
            expected = checkpoint.model(torch.cat([stream(checkpoint, FIRST, PROMPT), plain[None]], dim=1)).state
        found = open_memory(texts / "m", checkpoint)
        assert found.position == expected.position
        torch.testing.assert_close(
            found.layers[1].memory.current.inner, expected.layers[1].memory.current.inner, rtol=1e-3, atol=1e-6
        )

    def test_the_end_of_a_document_is_not_stored(self, make_checkpoint, monkeypatch):
        checkpoint = loaded(make_checkpoint("hope"))
        trained, tokenizer = TrainedModel.of(checkpoint), checkpoint.tokenizer
        length = stream(checkpoint, FIRST).shape[1]
        for last, read in ((tokenizer.encode("x")[0], 1), (tokenizer.end_of_text, 0)):
            logits = torch.nn.functional.one_hot(torch.tensor(last), 320).float()
            monkeypatch.setattr(
                "nested_lm.reading.generation.next_token_probabilities", lambda *_, drawn=logits, **__: drawn[None]
            )
            trained.forget()
            assert trained.generate(FIRST, temperature=0, max_new_tokens=1, remember=True) == "x" * read
            assert trained.memory.position == length + read

    @pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800"])
    def test_a_prompt_that_is_not_utf8_is_one_error(self, run, make_checkpoint, prompt):
        found = run("generate", make_checkpoint("hope"), "--prompt", prompt)
        assert found.exit_code == 2
        assert found.stderr.startswith("DataError: ")
        assert "Unicode: character" in found.stderr

    def test_a_console_that_is_not_utf8_gets_what_it_can_show(self, make_checkpoint, texts):
        code = "from nested_lm.cli.main import main; main()"
        arguments = ["generate", str(make_checkpoint("hope")), "--prompt", "漢 a", "--max-new-tokens", "1"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
            capture_output=True,
            check=True,
            cwd=texts,
        )
        assert done.stdout.startswith(b"\\u6f22 a")

    def test_an_update_without_a_memory_is_refused(self, run, make_checkpoint):
        found = run("generate", make_checkpoint("hope"), "--prompt", PROMPT, "--update-memory")
        assert found.exit_code == 2
        assert "name it with --memory" in found.stderr


def test_the_python_example_of_the_documentation(make_checkpoint, texts, capsys):
    (texts / "RUN").symlink_to(make_checkpoint("hope"))
    page = (ROOT / "docs" / "streaming.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(example, "streaming.md", "exec"), names := {})
    assert "bits per byte" in capsys.readouterr().out
    assert names["model"].memory.position == read_header(texts / "my.memory").position


class TestScore:
    def test_with_and_without_the_memory(self, memorize, run, make_checkpoint, texts):
        memorize("first.txt", "--memory", "m")
        before = kept(texts / "m")
        files = ["both.jsonl", "--memory", "m", "--json", "scores.json", "--batch-size", 2]
        said = run("score", "--checkpoint", make_checkpoint("hope"), *files)
        assert said.exit_code == 0, said.output
        assert kept(texts / "m") == before
        checkpoint = loaded(make_checkpoint("hope"))
        found = json.loads((texts / "scores.json").read_text())
        assert found["model"]["weights_hash"] == identity(checkpoint).weights_hash
        with torch.no_grad():
            memory = checkpoint.model(stream(checkpoint, FIRST)).state
            for row, text in zip(found["documents"], (FIRST, SECOND), strict=True):
                inputs = stream(checkpoint, text)
                targets = torch.cat([inputs[:, 1:], torch.tensor([[checkpoint.tokenizer.end_of_text]])], dim=1)
                for arm, state in (("fresh", None), ("memory", memory)):
                    nats = token_losses(checkpoint.model(inputs, state=state).logits, targets)[0]
                    assert row["token_nats"][arm] == pytest.approx(nats.tolist(), rel=1e-4, abs=1e-5)
                    bits = nats.sum().item() / math.log(2) / len(text.encode())
                    assert row["bits_per_byte"][arm] == pytest.approx(bits, rel=1e-5)
                    assert f"{row['bits_per_byte'][arm]:.4f} bits per byte" in said.stdout
                assert (row["bytes"], row["tokens"]) == (len(text.encode()), inputs.shape[1])
                assert row["bits_per_byte"]["fresh"] != row["bits_per_byte"]["memory"]
        total = {arm: f"{value:.4f} bits per byte" for arm, value in found["bits_per_byte"].items()}
        last = said.stdout.splitlines()[-2]
        assert last.startswith("all: ")
        assert all(value in last for value in total.values())

    def test_without_a_memory(self, run, make_checkpoint, texts):
        said = run("score", "--checkpoint", make_checkpoint("transformer"), "first.txt", "--json", "s.json")
        assert said.exit_code == 0, said.output
        assert "with the memory" not in said.stdout
        assert set(json.loads((texts / "s.json").read_text())["documents"][0]["token_nats"]) == {"fresh"}


class TestRefusals:
    @pytest.fixture(params=["generate", "score", "memorize"])
    def use(self, request, run, make_checkpoint, texts):
        """Use the memory `m` with a model; must fail and leave it as it is."""

        def invoke(*, kind="hope", seed=0):
            folder = make_checkpoint(kind, seed=seed)
            before = kept(texts / "m")
            arguments = {
                "generate": ["generate", folder, "--prompt", PROMPT, "--update-memory"],
                "score": ["score", "--checkpoint", folder, "first.txt"],
                "memorize": ["memorize", "--checkpoint", folder, "first.txt", "--continue"],
            }[request.param]
            found = run(*arguments, "--memory", "m")
            assert found.exit_code == 2, found.output
            assert kept(texts / "m") == before
            assert found.stderr.startswith("CheckpointError: m ")
            return found.stderr

        return invoke

    def test_other_weights(self, use, memorize, make_checkpoint):
        memorize("first.txt", "--memory", "m")
        said = use(seed=1)
        hashes = [identity(loaded(make_checkpoint("hope", seed=seed))).weights_hash[:16] for seed in (0, 1)]
        assert "belongs to another model (hope, step 3)" in said
        assert all(found in said for found in hashes)

    def test_another_architecture(self, use, memorize):
        memorize("first.txt", "--memory", "m")
        assert 'mixer.kind is "self_modifying" there and "attention" here' in use(kind="transformer")

    def test_a_damaged_file(self, use, memorize, texts):
        memorize("first.txt", "--memory", "m")
        content = bytearray((texts / "m").read_bytes())
        content[-9] ^= 4
        (texts / "m").write_bytes(content)
        assert "is damaged" in use()

    def test_several_streams(self, use, memorize, make_checkpoint, texts):
        from nested_lm.reading.memory_file import save_memory

        checkpoint = loaded(make_checkpoint("hope"))
        save_memory(texts / "m", checkpoint.model.initial_state(3), identity(checkpoint))
        assert "holds 3 streams, a memory here is one" in use()

    def test_another_safetensors_file(self, use, texts):
        save_file({"a": torch.ones(1)}, texts / "m")
        assert load_file(texts / "m")
        assert "is a safetensors file, but not a memory" in use()
