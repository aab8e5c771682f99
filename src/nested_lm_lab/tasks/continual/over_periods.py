"""Tasks that compare the periods of a chronological run: regret, carried state, lesions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nested_lm.checkpoint import LoadedCheckpoint, find_checkpoint, load_model
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.held_out import score_streaming
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.identity import identify, mark_checkpoint
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.continual.chronological import SegmentDocuments, matrix_over, score_segments, segment_documents
from nested_lm_lab.tasks.continual.clocks import centre_of_mass, spearman
from nested_lm_lab.tasks.continual.matrix import accuracy, backward_transfer, regret
from nested_lm_lab.tasks.continual.schema import (
    CarriedMetrics,
    ContinualMetrics,
    CorrelationScore,
    LesionLevel,
    LesionMetrics,
    OtherRun,
    RegretMetrics,
)
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.language_modelling import BITS, Reading

REGRET_VERSION = CARRIED_VERSION = LESION_VERSION = "1"


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of every segment of a run. progress: is told what has been scored of them."""

    splits: tuple[TokenDataset, ...]
    segments: list[SegmentDocuments]
    progress: Progress

    @classmethod
    def of(
        cls, subject: Subject, settings: ContinualSettings, progress: Progress, *, checkpoints: int = 0
    ) -> "HeldOut":
        """Collect them. checkpoints: how many will score them.

        Raises:
            DataError: the data set has no dates, or a segment no held-out document.
        """
        splits = (subject.split("validation"), subject.split("test"))
        segments = segment_documents(
            splits,
            subject.groups(),
            seed=subject.config.seed,
            context_length=subject.config.train.context_length,
            max_pieces=settings.pieces_per_document,
        )
        progress.total += checkpoints * sum(segment.tokens for segment in segments)
        return cls(splits, segments, progress)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the segments."""
        return tuple(segment.group.label for segment in self.segments)

    def nats(self, loaded: LoadedCheckpoint, settings: ContinualSettings) -> list[np.ndarray]:
        """Nats of each document of each segment, read the way this checkpoint's run reads."""
        return self.scores(loaded, settings)[0]

    def scores(
        self, loaded: LoadedCheckpoint, settings: ContinualSettings
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The same, and the tokens scored of each document."""
        reading = Reading(
            loaded.config.train.context_length, settings.batch_size, align=loaded.config.document_alignment
        )
        return score_segments(
            loaded.model,
            self.splits,
            self.segments,
            reading=reading,
            max_pieces=settings.pieces_per_document,
            on_tokens=self.progress.add,
        )


def _columns(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """From [row][segment] arrays over documents to one (documents, rows) array a segment."""
    return [np.stack([row[s] for row in rows], axis=1) for s in range(len(rows[0]))]


def _resampled(
    columns: Sequence[np.ndarray], sizes: Sequence[np.ndarray], bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """Bits per byte (rows, segments), and of resampled documents (samples, rows, segments).

    Segments are drawn apart from each other; every row is scored on the same draw.
    """
    value = np.stack([BITS * c.sum(axis=0) / size.sum() for c, size in zip(columns, sizes, strict=True)], axis=1)
    drawn = []
    for s, (column, size) in enumerate(zip(columns, sizes, strict=True)):
        top, bottom = replace(bootstrap, seed=bootstrap.seed + s).resample(column, size)
        drawn.append(BITS * top / bottom[:, None])
    return value, np.stack(drawn, axis=2)


def measure_matrix(subject: Subject, settings: ContinualSettings, progress: Progress) -> ContinualMetrics:
    """Score every border checkpoint on every segment."""
    paths = subject.borders()
    held_out = HeldOut.of(subject, settings, progress, checkpoints=len(paths))
    borders = (
        load_model(border, device=subject.device, tokenizer_hash=subject.identity.tokenizer_hash) for border in paths
    )
    bootstrap = Bootstrap(settings.bootstrap_samples)
    return matrix_over(borders, lambda loaded: held_out.scores(loaded, settings), held_out.segments, bootstrap)


def measure_regret(subject: Subject, settings: ContinualSettings, oracle: Path, progress: Progress) -> RegretMetrics:
    """Score every border checkpoint and an oracle that read the same text mixed.

    Raises:
        CheckpointError: the oracle may not be compared: other data, tokenizer, context or budget.
    """
    path = find_checkpoint(oracle, report=subject.report)
    loaded = load_model(path, device=subject.device, tokenizer_hash=subject.identity.tokenizer_hash)
    last = load_model(subject.borders()[-1], device="cpu")
    for what, there, here in (
        ("data_hash", loaded.identity["data_hash"], subject.identity.data_hash),
        ("context_length", loaded.config.train.context_length, subject.config.train.context_length),
        ("training tokens", loaded.tokens, last.tokens),
    ):
        if there != here:
            raise CheckpointError(
                f"{path} cannot be the oracle of {subject.identity.name}: its {what} is {there}, the run's is {here}; "
                "train one with the same budget on the same text, such as with train.stream.order=shuffled"
            )
    borders, bootstrap = subject.borders(), Bootstrap(settings.bootstrap_samples)
    held_out = HeldOut.of(subject, settings, progress, checkpoints=1 + len(borders))
    rows = [held_out.nats(loaded, settings)]
    for border in borders:
        rows.append(held_out.nats(load_model(border, device=subject.device), settings))
    columns, sizes = _columns(rows), [segment.bytes for segment in held_out.segments]
    value, drawn = _resampled(columns, sizes, bootstrap)
    found, spread = regret(value[1:], value[0]), regret(drawn[:, 1:], drawn[:, 0])
    documents = sum(len(size) for size in sizes)
    means = [bootstrap.percentile(float(f), d, documents) for f, d in zip(found, spread, strict=True)]
    mark = mark_checkpoint(path)
    return RegretMetrics(
        kind="regret",
        segments=held_out.labels,
        oracle=OtherRun(
            run_id=loaded.identity["run_id"],
            name=loaded.identity["name"],
            config_hash=loaded.identity["config_hash"],
            seed=loaded.identity["seed"],
            commit=loaded.identity["commit"],
            checkpoint=mark.name,
            digest=mark.digest,
            arm=identify(loaded, data_hash=lambda: subject.identity.data_hash).arm,
        ),
        bits_per_byte=tuple(
            bootstrap.ratio(column[:, 0], size, scale=BITS) for column, size in zip(columns, sizes, strict=True)
        ),
        regret=tuple(
            tuple(
                bootstrap.paired(column[:, row], column[:, 0], size, scale=BITS)
                for column, size in zip(columns, sizes, strict=True)
            )
            for row in range(2, len(rows))
        ),
        on=means[0],
        below=means[1],
        above=means[2],
    )


def measure_carried(subject: Subject, settings: ContinualSettings, progress: Progress) -> CarriedMetrics:
    """Score every border checkpoint on whole documents, each read in one stream with the state carried.

    Raises:
        ConfigError: the model's state grows with the text.
    """
    if not subject.loaded.model.has_constant_state:
        raise ConfigError(
            f"{subject.config.name}: the state of this model grows with the text, so that whole documents are not read "
            "in one stream; leave the task `carried` out"
        )
    held_out, bootstrap = HeldOut.of(subject, settings, progress), Bootstrap(settings.bootstrap_samples)
    rows, borders = [], subject.borders()
    progress.total += len(borders) * sum(
        split.documents[index].tokens
        for segment in held_out.segments
        for split, chosen in zip(held_out.splits, segment.indices, strict=True)
        for index in chosen
    )
    for border in borders:
        model = load_model(border, device=subject.device).model
        rows.append([_whole_documents(model, held_out, segment, settings, progress) for segment in held_out.segments])
    sizes = [
        np.concatenate(
            [
                np.array([split.documents[i].bytes for i in chosen], dtype=np.float64)
                for split, chosen in zip(held_out.splits, segment.indices, strict=True)
            ]
        )
        for segment in held_out.segments
    ]
    columns = _columns(rows)
    value, drawn = _resampled(columns, sizes, bootstrap)
    documents = sum(len(size) for size in sizes)
    return CarriedMetrics(
        kind="carried",
        segments=held_out.labels,
        bits_per_byte=tuple(
            tuple(bootstrap.ratio(c[:, t], size, scale=BITS) for c, size in zip(columns, sizes, strict=True))
            for t in range(len(rows))
        ),
        backward_transfer=bootstrap.percentile(float(backward_transfer(value)), backward_transfer(drawn), documents),
        accuracy=bootstrap.percentile(float(accuracy(value)), accuracy(drawn), documents),
    )


def _whole_documents(
    model: LanguageModel,
    held_out: HeldOut,
    segment: SegmentDocuments,
    settings: ContinualSettings,
    progress: Progress,
) -> np.ndarray:
    found = []
    for split, chosen in zip(held_out.splits, segment.indices, strict=True):
        if chosen:
            texts = [split.tokens(index) for index in chosen]
            scores = score_streaming(
                model,
                texts,
                batch_size=settings.batch_size,
                boundary=split.boundary,
            )
            found.append(scores.nats)
            progress.add(sum(map(len, texts)))
    return np.concatenate(found)


@torch.no_grad()
def set_back(model: LanguageModel, earlier: LanguageModel, level: int | None) -> dict[str, torch.Tensor]:
    """Give one level the weights it has in an earlier model, or, with None, everything outside the levels.

    Returns the weights that were replaced, for `load_state_dict(..., strict=False)` to put back.
    """
    before, roles = {}, model.parameter_roles()
    source = dict(earlier.named_parameters())
    for name, parameter in model.named_parameters():
        if roles[name].level == level:
            before[name] = parameter.detach().clone()
            parameter.copy_(source[name])
    return before


def measure_lesions(subject: Subject, settings: ContinualSettings, progress: Progress) -> LesionMetrics:
    """Set back one level at a time, at the end of the run, and see which segment gets worse.

    A[level][s] = L_S(s | level as at an earlier border, others as they are) - L_S(s).

    Raises:
        ConfigError: the model has no levels, or there is no such border.
    """
    periods = subject.config.model.channel.periods
    if not periods:
        raise ConfigError(
            f"{subject.config.name}: the channel memory {subject.config.model.channel.kind!r} has no levels to set "
            "back; leave the task `lesion` out"
        )
    borders = subject.borders()
    number = int(settings.set_back_to.removeprefix("period-"))
    if number >= len(borders) - 1:
        raise ConfigError(
            f"levels cannot be set back to {settings.set_back_to}: the borders before the end of this run are period-0 "
            f"to period-{len(borders) - 2}"
        )
    bootstrap = Bootstrap(settings.bootstrap_samples)
    held_out = HeldOut.of(subject, settings, progress, checkpoints=2 + len(periods))  # whole, each level, the others
    last = load_model(borders[-1], device=subject.device)
    earlier = load_model(borders[number], device=subject.device).model
    whole = held_out.nats(last, settings)
    lesions = []
    for level in (*range(len(periods)), None):
        before = set_back(last.model, earlier, level)
        lesions.append(held_out.nats(last, settings))
        last.model.load_state_dict(before, strict=False)
    sizes = [segment.bytes for segment in held_out.segments]
    damage = [
        tuple(bootstrap.paired(a, b, size, scale=BITS) for a, b, size in zip(lesion, whole, sizes, strict=True))
        for lesion in lesions
    ]
    value, drawn = _resampled(_columns([whole, *lesions[:-1]]), sizes, bootstrap)
    centres = centre_of_mass(value[1:] - value[0])
    spread = np.stack([centre_of_mass(d[1:] - d[0]) for d in drawn])  # (samples, levels)
    is_known = np.isfinite(centres)
    correlation = spearman(
        np.log(np.array(periods, dtype=np.float64))[is_known],
        centres[is_known],
        permutations=settings.permutations,
        seed=settings.seed,
    )
    documents = sum(len(size) for size in sizes)
    return LesionMetrics(
        kind="lesion",
        segments=held_out.labels,
        set_back_to=settings.set_back_to,
        bits_per_byte=tuple(bootstrap.ratio(a, size, scale=BITS) for a, size in zip(whole, sizes, strict=True)),
        levels=tuple(
            LesionLevel(
                level=level,
                period_tokens=period,
                damage=damage[level],
                centre=_centre(bootstrap, float(centres[level]), spread[:, level], documents),
            )
            for level, period in enumerate(periods)
        ),
        others=damage[-1],
        correlation=None if correlation is None else CorrelationScore(**vars(correlation)),
    )


def _centre(bootstrap: Bootstrap, value: float, drawn: np.ndarray, documents: int) -> Interval | None:
    """Interval of a centre over the draws in which the lesion damages something."""
    if not np.isfinite(value):
        return None
    return bootstrap.percentile(value, drawn[np.isfinite(drawn)], documents)
