"""Which pictures look like which: copies within a data set, and pictures of a benchmark that strayed into it.

Enters: the looks of pictures, in order. Leaves: for each picture the place of the first one that it is a copy of, or
-1. A picture is compared with those kept before it and not with copies: a chain of small changes does not make one
picture of a whole film.
"""

from __future__ import annotations

import numpy as np

from mllm.data.curation.filters.look import Looks, bits_of, same_colours
from mllm.data.curation.filters.near import near_pairs


def first_copies(looks: Looks, distance: int) -> np.ndarray:
    """int64 [N]: the first picture that was kept and looks the same; -1 for a picture that is kept itself."""
    pairs = alike(looks, looks, distance, earlier=True)
    original = np.full(len(looks), -1, dtype=np.int64)
    for picture, other in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
        if original[picture] < 0 and original[other] < 0:
            original[picture] = other
    return original


def found_in(looks: Looks, known: Looks, distance: int) -> np.ndarray:
    """int64 [N]: the first of the known pictures that looks the same, or -1."""
    place = np.full(len(looks), len(known), dtype=np.int64)
    pairs = alike(looks, known, distance)
    np.minimum.at(place, pairs[:, 0], pairs[:, 1])
    place[place == len(known)] = -1
    return place


def alike(left: Looks, right: Looks, distance: int, earlier: bool = False) -> np.ndarray:
    """int64 [P, 2]: places of each pair that looks the same, once; only where the right one is `earlier`, if asked."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for some, others in near_pairs(bits_of(left), bits_of(right), distance):
        if earlier:
            some, others = some[others < some], others[others < some]
        same = same_colours(left[some], right[others], distance)
        found.append(np.stack([some[same], others[same]], axis=1))
    return np.unique(np.concatenate(found), axis=0)
