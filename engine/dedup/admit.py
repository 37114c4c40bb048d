"""A batch of texts in one compiled call: cut, find, and insert what has nothing alike, or all.

A call for each text costs more in crossings between Python and compiled code, and in turns at the
GIL, than in work.

Where an index is large and there are cores to spare, the batch is looked up before in all that the
index holds by then, by several threads (``look``); what is left for the one that decides are the
items that the batch itself adds. Both searches are exact, so the better of two hits is the hit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import CHUNK, compiled, find, insert, signed
from engine.dedup.vocabulary import cut

__all__ = ["admit", "cut_all", "look"]


@compiled
def cut_all(
    data: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    seed: int,
    known: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    buckets: NDArray[np.uint32],
    links: NDArray[np.uint32],
    ids: NDArray[np.uint32],
    places: NDArray[np.int64],
) -> None:
    """The tokens of texts, learning none: those of text i to ``ids[places[i]:places[i + 1]]``."""
    places[0] = 0
    for i in range(len(bounds) - 1):
        text = data[bounds[i] : bounds[i + 1]]
        n, _ = cut(text, False, seed, known, letters, ends, buckets, links, ids[places[i] :])
        places[i + 1] = places[i] + n


@compiled
def look(
    ids: NDArray[np.uint32],
    places: NDArray[np.int64],
    first: int,
    step: int,
    known: int,
    epochs: int,
    threshold: float,
    limits: NDArray[np.int64],
    tokens: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    levels: NDArray[np.uint8],
    heads: NDArray[np.uint32],
    signatures: NDArray[np.uint64],
    postings: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    seen: NDArray[np.uint32],
    items: NDArray[np.int64],
    scores: NDArray[np.float64],
) -> None:
    """``find`` every ``step``-th text from ``first`` on, cut as ``cut_all`` cuts, and write what it
    returns to ``items`` and ``scores``. Writes to nothing else that threads share.
    """
    for i in range(first, len(places) - 1, step):
        items[i], scores[i] = find(
            ids[places[i] : places[i + 1]],
            known,
            epochs,
            threshold,
            limits,
            tokens,
            starts,
            levels,
            heads,
            signatures,
            postings,
            rows,
            seen,
            0,
        )


@compiled
def admit(
    data: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    most: int,
    size: int,
    last: int,
    room: int,
    epoch: int,
    threshold: float,
    seed: int,
    known: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    buckets: NDArray[np.uint32],
    links: NDArray[np.uint32],
    limits: NDArray[np.int64],
    tokens: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    counts: NDArray[np.uint32],
    levels: NDArray[np.uint8],
    heads: NDArray[np.uint32],
    signatures: NDArray[np.uint64],
    postings: NDArray[np.uint32],
    end: int,
    rows: NDArray[np.uint32],
    seen: NDArray[np.uint32],
    items: NDArray[np.int64],
    scores: NDArray[np.float64],
    since: int,
    is_decided: bool,
) -> tuple[int, int, int, int]:
    """``find`` each text, and ``insert`` those without a hit, in their order; all of them where it
    is decided that they are in.

    Text i is ``data[bounds[i]:bounds[i + 1]]``, at most ``most`` bytes, lower-cased. Fills
    ``items`` and ``scores`` as ``find`` returns them; they hold what ``look`` found among the items
    before ``since``, if that is not 0. Returns how many texts were judged, and the
    new sizes of index and vocabulary and the end of the postings. Stops before a text for which
    there may be no room in arrays of ``room`` elements, and once the index has ``last`` items.
    """
    ids = np.empty((most + 1) // 2, np.uint32)
    for i in range(len(bounds) - 1):
        text = data[bounds[i] : bounds[i + 1]]
        n = (len(text) + 1) // 2
        if (
            size >= last
            or end + n * (2 + CHUNK) > room
            or signed(starts[size]) + n > room
            or max(known + n, size + 1) + 1 > min(room, len(links))
            or signed(ends[known]) + len(text) > len(letters)
        ):
            return i, size, known, end
        if since == 0:
            items[i] = -1
        if not is_decided:
            n, _ = cut(text, False, seed, known, letters, ends, buckets, links, ids)
            item, score = find(
                ids[:n],
                known,
                epoch + 1,
                threshold,
                limits,
                tokens,
                starts,
                levels,
                heads,
                signatures,
                postings,
                rows,
                seen,
                since,
            )
            # Of equals the earlier one stands, which is the one that was found before.
            if item >= 0 and (items[i] < 0 or score > scores[i]):
                items[i], scores[i] = item, score
        if items[i] < 0:
            n, known = cut(text, True, seed, known, letters, ends, buckets, links, ids)
            end = insert(
                ids[:n],
                size,
                epoch,
                threshold,
                tokens,
                starts,
                counts,
                levels,
                heads,
                signatures,
                postings,
                end,
            )
            size += 1
    return len(bounds) - 1, size, known, end
