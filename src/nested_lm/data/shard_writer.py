"""Writing shards so that a killed build goes on: a finished shard has a marker and is never written twice."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nested_lm.data.manifest import ShardRecord, shard_file
from nested_lm.data.notes import sealed, unsealed
from nested_lm.data.shards import check_shard, token_dtype
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically


@dataclass(frozen=True)
class Marker:
    """Says that a shard is finished. first: rank of its first document within the split."""

    shard: int
    first: int
    document_tokens: list[int]
    tokens: int
    sha256: str
    tokenizer: str

    @property
    def end(self) -> int:
        """Rank after its last document."""
        return self.first + len(self.document_tokens)


class SplitWriter:
    """Writes the documents of one split, in order, into shards of at least `shard_tokens` tokens.

    A document never crosses shards. Where shards end depends on the documents alone, so a shard that is
    rebuilt has the bytes it had. Finished shards that are whole are kept: `wants` says what is left to do.

    key: seals the markers; a marker of another build, or one that was changed, is no marker.
    """

    def __init__(
        self,
        folder: Path,
        markers: Path,
        split: str,
        *,
        shard_tokens: int,
        tokenizer: TextTokenizer,
        key: str,
        report: Callable[[str], None],
    ) -> None:
        self.split = split
        self._key = key
        self._folder = folder
        self._marker_folder = markers
        self._shard_tokens = shard_tokens
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._report = report
        self._markers = self._finished()
        self.kept = len(self._markers)
        self._starts = [marker.first for marker in self._markers]
        self._buffer: list[np.ndarray] = []
        self._buffer_first = 0
        self._buffer_tokens = 0

    def wants(self, rank: int) -> bool:
        """Whether the document of this rank is in no finished shard. Ask before the first `add`."""
        before = bisect_right(self._starts, rank) - 1
        return before < 0 or rank >= self._markers[before].end

    def add(self, rank: int, tokens: np.ndarray) -> None:
        """Append the next wanted document."""
        if self._buffer and rank != self._buffer_first + len(self._buffer):
            self._flush()  # the documents between are in a finished shard
        if not self._buffer:
            self._buffer_first = rank
        self._buffer.append(tokens.astype(self._dtype))
        self._buffer_tokens += len(tokens)
        if self._buffer_tokens >= self._shard_tokens:
            self._flush()

    def finish(self, num_documents: int) -> list[Marker]:
        """Write what is left and return the markers of all shards in order."""
        if self._buffer:
            self._flush()
        rank = 0
        for index, marker in enumerate(self._markers):
            assert (marker.shard, marker.first) == (index, rank), f"{self.split} shard {index} out of order"
            rank = marker.end
        assert rank == num_documents, f"{self.split}: {rank} of {num_documents} documents written"
        return self._markers

    def record(self, marker: Marker) -> ShardRecord:
        """Entry of the manifest."""
        return ShardRecord(file=shard_file(self.split, marker.shard), tokens=marker.tokens, sha256=marker.sha256)

    def _marker_path(self, shard: int) -> Path:
        return self._marker_folder / f"{self.split}-{shard:05d}.json"

    def _finished(self) -> list[Marker]:
        markers = []
        for path in sorted(self._marker_folder.glob(f"{self.split}-*.json")):
            try:
                marker = Marker(**unsealed(path.read_bytes(), key=self._key))
                check_shard(self._folder, self.record(marker), self._tokenizer.vocab_size, self.split, verify=True)
            except (OSError, ValueError, TypeError) as error:
                self._report(f"marker {path.name} is damaged ({error}); its shard is built again")
                continue
            except DataError as error:
                self._report(f"{str(error).splitlines()[0]}; it is built again")
                continue
            if marker.tokenizer == self._tokenizer.hash:
                markers.append(marker)
        return sorted(markers, key=lambda marker: marker.first)

    def _flush(self) -> None:
        place = bisect_right([marker.first for marker in self._markers], self._buffer_first)
        shard = self._markers[place - 1].shard + 1 if place else 0
        content = np.concatenate(self._buffer).tobytes()
        marker = Marker(
            shard=shard,
            first=self._buffer_first,
            document_tokens=[len(tokens) for tokens in self._buffer],
            tokens=self._buffer_tokens,
            sha256=hashlib.sha256(content).hexdigest(),
            tokenizer=self._tokenizer.hash,
        )
        # The marker comes second: a shard without one is written again, a marker without a shard cannot be.
        write_atomically(self._folder / shard_file(self.split, shard), content)
        write_atomically(self._marker_path(shard), sealed(asdict(marker), key=self._key))
        self._markers.insert(place, marker)
        self._buffer, self._buffer_tokens = [], 0
        self._report(
            f"{shard_file(self.split, shard)}: {len(marker.document_tokens)} documents, {marker.tokens:,} tokens"
        )
