"""Batches in smaller ones: of so many samples, and of one half of the samples.

A sample's half is told by its place in the data, even or odd. So the halves are the same whatever the batches, the
padding, the order in which samples of like length are read and the processes that share the same data. Data in another
order have other halves, and of data that come already divided among processes each process halves its own. A batch that
can only be read as a whole is of one half: of batches of one size every second one.
"""

from __future__ import annotations

from itertools import pairwise

from headstart.statistics.batches import Samples, take


def half_of(samples: Samples) -> int:
    """Return which half a batch belongs to, 0 or 1: its samples' own, or of one that is read as a whole, its own."""
    places = {index % 2 for index in samples.indices}
    return places.pop() if len(places) == 1 else samples.first // samples.size % 2


def by_half(samples: Samples) -> list[Samples]:
    """Divide a batch that can be cut into its samples of either half."""
    halves = [[row for row, index in enumerate(samples.indices) if index % 2 == half] for half in (0, 1)]
    return [_rows(samples, rows) for rows in halves if rows] if all(halves) else [samples]


def divided(samples: Samples, most: int) -> list[Samples]:
    """Divide a batch that can be cut into even parts of at most ``most`` samples."""
    count = -(-samples.size // most)
    bounds = [part * samples.size // count for part in range(count + 1)]
    return [_rows(samples, list(range(low, high))) for low, high in pairwise(bounds)]


def _rows(samples: Samples, rows: list[int]) -> Samples:
    return Samples(take(samples.batch, rows), tuple(samples.indices[row] for row in rows))
