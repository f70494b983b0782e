"""The columns of an index that a plan needs, and which kind of a record is used when.

Enters: per sample its length, images, source, group and weight, as NumPy arrays. Leaves: `Columns`, checked, and
`Records`, which turns the numbers of records into the numbers of samples. A record is a group of consecutive samples:
the captions of one image, say, of which one is used a pass. Most records are one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mllm.data.planning.order import key_of, scramble


@dataclass(frozen=True, eq=False)
class Columns:
    """One entry a sample; about 22 MB a million of them."""

    length: np.ndarray
    """Tokens, visual ones included; int32."""
    images: np.ndarray
    """Number of images; int32."""
    source: np.ndarray
    """Number of the source in `data.sources`; int16."""
    group: np.ndarray
    """The same for all kinds of one record, which stand side by side; never falling; int64."""
    weight: np.ndarray
    """How often a kind is drawn, relative to the others of its group; float32."""

    def __post_init__(self) -> None:
        if not len(self.length):
            raise ValueError("no samples to plan: check the files under data.sources")
        sizes = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        assert len(set(sizes.values())) == 1, f"columns of different sizes: {sizes}"
        assert (np.diff(self.group) >= 0).all(), "the samples of a group must stand side by side"

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> Columns:
        """Samples of one source, each a record of its own, without images."""
        count = len(lengths)
        none, one = np.zeros(count, dtype=np.int32), np.ones(count, dtype=np.float32)
        return cls(np.asarray(lengths, dtype=np.int32), none, none.astype(np.int16), np.arange(count), one)

    def digest(self) -> bytes:
        """Equal for equal columns."""
        digest = hashlib.sha256()
        for field in fields(self):
            column = np.ascontiguousarray(getattr(self, field.name))
            digest.update(f"{field.name} {column.dtype.str} {len(column)}".encode())
            digest.update(column.data)
        return digest.digest()


class Records:
    """The records of each source, and the sample that stands for a record in a pass."""

    def __init__(self, columns: Columns, sources: int, key: int) -> None:
        self.columns, self.key = columns, key
        new = np.flatnonzero(np.diff(columns.group, prepend=columns.group[0] - 1))
        self.first = np.append(new, len(columns.group))  # of record r the first sample, and one entry more at the end
        source = columns.source[new]
        assert source.min() >= 0, "a source has a negative number"
        self._check(source)
        self.sizes = np.bincount(source, minlength=sources)
        """Records of each source."""
        self._members = np.argsort(source, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def _check(self, source: np.ndarray) -> None:
        columns, first = self.columns, self.first[:-1]
        assert (np.repeat(source, np.diff(self.first)) == columns.source).all(), "kinds of one record in two sources"
        if (columns.weight < 0).any():
            raise ValueError(f"sample {int(np.argmin(columns.weight))} has a negative weight: see `text.weights`")
        total = np.add.reduceat(columns.weight, first)
        if not total.all():
            raise ValueError(
                f"record {int(np.argmin(total))} of the index has only kinds of text whose weight is 0: "
                f"give one of them a weight in `text.weights`, or filter such records out"
            )

    def samples(self, source: int, places: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """The samples of those records of a source: where a record has kinds, the one drawn for that pass.

        What is drawn depends on (seed, group, pass) and nothing else: neither on the order nor on the mixture.
        """
        records = self._members[self._starts[source] + places]
        samples, count = self.first[records], self.first[records + 1] - self.first[records]
        many = np.flatnonzero(count > 1)
        if len(many):
            samples[many] += self._kinds(samples[many], count[many], passes[many])
        return samples

    def _kinds(self, first: np.ndarray, count: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """For groups that start at `first` and have `count` kinds, which kind is drawn."""
        place = np.arange(count.max())
        weights = self.columns.weight[first[:, None] + np.minimum(place, count[:, None] - 1)].astype(np.float64)
        reach = np.cumsum(np.where(place < count[:, None], weights, 0), axis=1)
        bits = scramble(self.key, scramble(key_of(self.key), self.columns.group[first]) + passes.astype(np.uint64))
        toss = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1)
        return (toss[:, None] * reach[:, -1:] >= reach).sum(axis=1)
