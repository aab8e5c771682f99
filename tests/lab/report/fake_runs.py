"""Writes a campaign folder as the real stages leave it, with plausible numbers, through the real schemas."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

from nested_lm.config.load import config_hash, dump_resolved, load_run
from nested_lm.config.run import RunConfig
from nested_lm.data.manifest import fingerprint_of, shard_file
from nested_lm_lab.evaluation.bootstrap import Bootstrap, wilson
from nested_lm_lab.evaluation.results import write_result
from nested_lm_lab.evaluation.schema import CheckpointMark, Metrics, ResultFile, RunIdentity
from nested_lm_lab.report.manifest import CampaignManifest, RunEntry, StepEntry, write_manifest
from nested_lm_lab.tasks.continual.schema import ContinualMetrics, Segment
from nested_lm_lab.tasks.needles.metrics import PasskeyLength, PasskeyMetrics, PasskeySample
from nested_lm_lab.tasks.schema import (
    DocumentSums,
    FloorScores,
    LanguageModellingMetrics,
    PeriodScore,
    PositionScore,
    ProtocolScores,
    SamplingMetrics,
    TextSample,
)

BOOTSTRAP = Bootstrap(samples=200)
BITS = 1 / math.log(2)
PRESETS = {
    "hope": "hope/demo",
    "transformer": "baselines/transformer_demo",
    "hope-chronological": "hope/demo_chronological",
    "transformer-chronological": "baselines/transformer_demo_chronological",
}
HOPE_TEXT = (
    " and House of Representatives:\n\nI have the honor to transmit to Congress the report of the Secretary "
    "of the Treasury on the state of the revenue, and of the several treaties which have been made with the "
    "Indian tribes upon the frontier. The peace of the country has been so well kept that"
)
TRANSFORMER_TEXT = (
    " and of the House:\n\nThe condition of the public lands has been the subject of the most of the United "
    "States, and the amount of the year of the Government of the same to be made in the public debt"
)
PARAMETERS = {"hope": 1_212_416, "transformer": 1_206_528}
LOSS = {"hope": 3.62, "transformer": 3.71}


@cache
def preset(name: str, folder: str, seed: int) -> RunConfig:
    return load_run(PRESETS[name], [f"output_dir={folder}", f"seed={seed}"])


def write_campaign(
    root: Path,
    names: tuple[str, ...] = tuple(PRESETS),
    *,
    seed: int = 1,
    tasks: tuple[str, ...] = ("language_modelling", "passkey", "sampling", "continual"),
    sample_text: str | None = None,
    parameters: dict[str, int] | None = None,
    identity: dict[str, dict[str, object]] | None = None,
    better: float = 0.0,
) -> Path:
    """Write runs and results below `root`.

    names: keys of PRESETS. tasks: results that exist. identity: fields of a run's results that differ.
    better: nats a token by which the transformer is improved.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        kind = name.split("-")[0]
        folder = root / "runs" / name
        config = preset(name, f"artifacts/runs/{name}", seed)
        count = (PARAMETERS | (parameters or {}))[kind]
        record = _record(config, count)
        folder.mkdir(parents=True, exist_ok=True)
        dump_resolved(config, folder / "config.resolved.yaml")
        (folder / "run.json").write_text(json.dumps(record))
        _write_metrics(folder / "metrics.jsonl", config, kind)
        loss = LOSS[kind] - (better if kind == "transformer" else 0.0)
        for metrics in _metrics(kind, loss, sample_text):
            if metrics.kind not in tasks or (metrics.kind == "continual") != ("chronological" in name):
                continue
            own = (identity or {}).get(name, {})
            write_result(folder / "results" / f"{metrics.kind}.json", _result(config, record, metrics, own))
    manifest = CampaignManifest(
        schema_version=1,
        name="demo",
        title="Hope beside Transformer++ on the State of the Union addresses",
        data=("data",),
        runs=tuple(
            RunEntry(step=n, name=preset(n, f"artifacts/runs/{n}", seed).name, folder=f"runs/{n}", evaluated=True)
            for n in names
        ),
        steps=tuple(StepEntry(id=name, kind="train", arguments=("train", PRESETS[name])) for name in names),
    )
    write_manifest(root, manifest)
    _write_data(root / "data")
    return root


def _record(config: RunConfig, parameters: int) -> dict[str, object]:
    return {
        "run_id": f"{config.name}-1a2b3c4d",
        "name": config.name,
        "config_hash": config_hash(config),
        "data_hash": "6f1c2e9d0b7a4835",
        "tokenizer_hash": "9e" * 32,
        "commit": "c0ffee1234567890c0ffee1234567890c0ffee12",
        "seed": config.seed,
        "created": "2026-03-04T05:06:07+00:00",
        "versions": {"nested-lm": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.3.1"},
        "device": "cpu: 2 cores, x86_64",
        "parameters": parameters,
    }


def _write_data(folder: Path) -> None:
    def split(name: str, documents: int, tokens: int, size: int) -> dict[str, object]:
        shard = {"file": shard_file(name, 0), "tokens": tokens, "sha256": "ef" * 32}
        return {"documents": documents, "tokens": tokens, "bytes": size, "shards": [shard]}

    digest = "ab" * 32
    document = {
        "schema_version": 1,
        "name": "sotu-demo",
        "licence": "public domain",
        "source": {"description": "State of the Union addresses 1790-2026", "digest": digest},
        "created_from": "0123456789abcdef",
        "recipe": {},
        "fingerprint": fingerprint_of({}, digest, None),
        "tokenizer": {"file": "tokenizer.json", "sha256": "9e" * 32, "vocab_size": 2048},
        "documents": {"file": "documents.jsonl", "sha256": "cd" * 32},
        "splits": {
            "train": split("train", 214, 2_400_000, 9_100_000),
            "validation": split("validation", 12, 90_000, 360_000),
            "test": split("test", 12, 90_000, 360_000),
        },
        "periods": [],
        "duplicates_removed": 1,
        "skipped": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(document))


def _write_metrics(path: Path, config: RunConfig, kind: str) -> None:
    rng = np.random.default_rng(5)
    train = config.train
    speed = {"hope": 7_900.0, "transformer": 21_500.0}[kind]
    lines = []
    for step in range(1, train.num_steps + 1):
        tokens = step * train.step_tokens
        seconds = tokens / speed
        loss = LOSS[kind] - 0.25 + 4.0 * math.exp(-tokens / 2.2e5) + 0.05 * rng.standard_normal()
        row = {"event": "step", "step": step, "tokens": tokens, "loss": loss, "rate": 0.01}
        row |= {"grad_norm": 1.1, "tokens_per_s": speed, "seconds": seconds, "memory_mb": 910.0}
        if step % train.logging.every_steps == 0 or step == train.num_steps:
            row |= _inside(kind, step / train.num_steps, rng)
        lines.append(row)
        if tokens // train.evaluate_every_tokens > (tokens - train.step_tokens) // train.evaluate_every_tokens:
            value = loss + 0.06
            row = {"event": "eval", "step": step, "tokens": tokens, "seconds": seconds}
            lines.append(row | {"validation_loss": value, "validation_bpb": value * BITS / 3.9})
    lines.append({"event": "done", "step": train.num_steps, "tokens": tokens, "seconds": seconds})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _inside(kind: str, share: float, rng: np.random.Generator) -> dict[str, float]:
    """Update norms, gate means and fast-weight norms of one logged step."""
    groups = {"embedding": 0.02, "matrix": 0.015, "vector": 0.008}
    if kind == "hope":
        groups |= {"level0/matrix": 0.014, "level1/matrix": 0.021}
        groups |= {f"memory/{name}": 0.01 * (1 + i) for i, name in enumerate(("k", "v", "eta", "alpha", "memory"))}
    decay = math.exp(-2.5 * share)
    row = {f"update_norm/{n}": v * decay * (1 + 0.1 * rng.standard_normal()) for n, v in groups.items()}
    if kind == "hope":
        for layer in range(4):
            row[f"layer{layer}/rate"] = 0.5 + 0.08 * (layer - 1.5) * share + 0.004 * rng.standard_normal()
            row[f"layer{layer}/decay"] = 1 - 0.0005 * (1 + layer * share * 2)
            for index, name in enumerate(("k", "v", "eta", "alpha", "memory")):
                row[f"layer{layer}/fast_norm/{name}"] = 3 + index + 2 * share * (layer + 1) / 4
    return row


def _result(config: RunConfig, record: dict[str, object], metrics: Metrics, own: dict[str, object]) -> ResultFile:
    section = getattr(config.eval, metrics.kind, None)
    fields = {key: record[key] for key in ("run_id", "name", "config_hash", "data_hash", "tokenizer_hash")}
    fields |= {key: record[key] for key in ("commit", "seed", "parameters")}
    fields |= {
        "arm": f"{config.model.mixer.kind}+{config.model.channel.kind}",
        "tokens": config.train.num_steps * config.train.step_tokens,
        "step": config.train.num_steps,
        "context_length": config.train.context_length,
    }
    return ResultFile(
        schema_version=1,
        task=metrics.kind,
        task_version="1",
        identity=RunIdentity(**(fields | own)),
        settings={"periods": 4} if section is None else section.model_dump(mode="json"),
        checkpoint=CheckpointMark(name=f"step-{config.train.num_steps:08d}", digest="5a" * 16),
        device="cpu",
        metrics=metrics,
        created="2026-03-04T05:16:07+00:00",
        wall_seconds=12.0,
    )


def _metrics(kind: str, loss: float, sample_text: str | None) -> list[Metrics]:
    text = sample_text or (HOPE_TEXT if kind == "hope" else TRANSFORMER_TEXT)
    sample = TextSample(prompt="Fellow-citizens of the Senate", text=text, tokens=120, ended=False, seed=0)
    return [
        _language_modelling(kind, loss),
        _passkey(kind),
        SamplingMetrics(kind="sampling", samples=(sample,), tokens_per_s=310.0),
        _continual(kind),
    ]


def _language_modelling(kind: str, loss: float) -> LanguageModellingMetrics:
    rng = np.random.default_rng(11)
    count = 14
    period = np.sort(rng.integers(0, 10, count))
    tokens = rng.integers(1200, 9000, count)
    size = (tokens * rng.uniform(3.6, 4.2, count)).astype(int)
    hardness = 1 + 0.05 * rng.standard_normal(count) + 0.006 * period
    own = np.random.default_rng(len(kind))
    window = tokens * hardness * loss * (1 + 0.006 * own.standard_normal(count))
    streaming = window * (0.985 + 0.004 * own.standard_normal(count))
    unigram, bigram = tokens * hardness * 5.75, tokens * hardness * 4.35

    def periods(nats: np.ndarray) -> tuple[PeriodScore, ...]:
        scores = []
        for index in range(10):
            here = period == index
            value = BOOTSTRAP.ratio(nats[here], size[here], scale=BITS) if here.any() else None
            first = 1790 + 25 * index
            scores.append(
                PeriodScore(
                    label=f"{first}-{first + 24}",
                    first_year=first,
                    last_year=first + 24,
                    documents=int(here.sum()),
                    bits_per_byte=value,
                )
            )
        return tuple(scores)

    def positions(nats: np.ndarray, last: int) -> tuple[PositionScore, ...]:
        scores, edge = [], 0
        while edge < last:
            end = 4 if edge == 0 else 2 * edge
            share = 1.0 + 1.1 / (1 + edge / 6) + (0 if last < 300 else -0.004 * math.log2(1 + edge / 256))
            value = BOOTSTRAP.ratio(nats * share, tokens)
            scores.append(PositionScore(first=edge, last=end - 1, tokens=4000, nats_per_token=value))
            edge = end
        return tuple(scores)

    def protocol(nats: np.ndarray, last: int) -> ProtocolScores:
        return ProtocolScores(
            bits_per_byte=BOOTSTRAP.ratio(nats, size, scale=BITS),
            nats_per_token=BOOTSTRAP.ratio(nats, tokens),
            below_bigram=BOOTSTRAP.paired(bigram, nats, size, scale=BITS),
            by_period=periods(nats),
            by_position=positions(nats, last),
            tokens_per_s=20_000.0,
        )

    def floor(nats: np.ndarray) -> FloorScores:
        return FloorScores(
            bits_per_byte=BOOTSTRAP.ratio(nats, size, scale=BITS),
            nats_per_token=BOOTSTRAP.ratio(nats, tokens),
            by_period=periods(nats),
        )

    hope = kind == "hope"
    return LanguageModellingMetrics(
        kind="language_modelling",
        split="test",
        window=protocol(window, 256),
        streaming=protocol(streaming, 8192) if hope else None,
        streaming_gain=BOOTSTRAP.paired(window, streaming, size, scale=BITS) if hope else None,
        unigram=floor(unigram),
        bigram=floor(bigram),
        documents=DocumentSums(
            id=tuple(f"sotu-{index}" for index in range(count)),
            period=tuple(int(p) for p in period),
            bytes=tuple(int(b) for b in size),
            tokens=tuple(int(t) for t in tokens),
            window_nats=tuple(float(v) for v in window),
            streaming_nats=tuple(float(v) for v in streaming) if hope else None,
            unigram_nats=tuple(float(v) for v in unigram),
            bigram_nats=tuple(float(v) for v in bigram),
        ),
    )


def _passkey(kind: str) -> PasskeyMetrics:
    rng = np.random.default_rng(3)
    lengths = []
    for index, length in enumerate((256, 512, 1024, 2048)):
        base = 4.1 if kind == "hope" else 4.3 + 0.5 * index
        control = base + 0.25 + 0.1 * rng.standard_normal(20)
        nats = control - (0.5 if kind == "hope" else 0.2) / (1 + index) + 0.1 * rng.standard_normal(20)
        samples = tuple(
            PasskeySample(
                depth=float(depth),
                answer_tokens=5,
                nats_per_token=float(a),
                exact=False,
                first_rank=40,
                control_nats_per_token=float(b),
                control_exact=False,
                control_first_rank=60,
            )
            for depth, a, b in zip(np.linspace(0, 1, 20), nats, control, strict=True)
        )
        lengths.append(
            PasskeyLength(
                length=length,
                nats_per_token=BOOTSTRAP.mean(nats),
                exact=wilson(0, 20),
                median_first_rank=40.0,
                control_nats_per_token=BOOTSTRAP.mean(control),
                control_exact=wilson(0, 20),
                control_median_first_rank=60.0,
                worth=BOOTSTRAP.mean(control - nats),
                tokens_per_s=9000.0,
                samples=samples,
            )
        )
    reading = "segments" if kind == "hope" else "whole"
    return PasskeyMetrics(kind="passkey", reading=reading, lengths=tuple(lengths))


def _continual(kind: str) -> ContinualMetrics:
    rng = np.random.default_rng(8)
    labels = ("1790-1839", "1840-1889", "1890-1939", "1940-2026")
    losses = np.zeros((5, 4))
    forget = 0.010 if kind == "hope" else 0.017
    for t in range(5):
        for s in range(4):
            learnt = 2.9 if t == 0 else 1.62 + 0.16 * max(s + 1 - t, 0) - 0.005 * t
            losses[t, s] = learnt + forget * max(t - s - 1, 0) * (t > s) + 0.01 * s

    def interval(value: float):
        return BOOTSTRAP.mean(value + 0.01 * rng.standard_normal(24)).model_copy(update={"value": float(value)})

    def cell(value: float):
        found = interval(value)
        low, high = min(found.low, value), max(found.high, value)
        return found.model_copy(update={"low": low, "high": high})

    trained = losses[1:]
    best = [[min(trained[s : t + 1, s]) if t >= s else None for s in range(4)] for t in range(4)]
    diagonal = np.array([trained[s, s] for s in range(4)])
    return ContinualMetrics(
        kind="continual",
        segments=tuple(
            Segment(
                label=label,
                periods=(2 * i, 2 * i + 1),
                documents=6,
                bytes=160_000,
                tokens=41_000,
                trained_tokens=120_000 * (i + 1),
            )
            for i, label in enumerate(labels)
        ),
        bits_per_byte=tuple(tuple(cell(v) for v in row) for row in losses),
        nats_per_token=tuple(tuple(cell(v * 2.7) for v in row) for row in losses),
        forgetting=tuple(
            tuple(None if best[t][s] is None else cell(trained[t, s] - best[t][s]) for s in range(4)) for t in range(4)
        ),
        backward_transfer=cell(float(np.mean(diagonal[:3] - trained[3, :3]))),
        forward_transfer=cell(float(np.mean([losses[0, s] - losses[s, s] for s in range(1, 4)]))),
        plasticity=cell(float(diagonal.mean())),
        accuracy=cell(float(trained[3].mean())),
    )
