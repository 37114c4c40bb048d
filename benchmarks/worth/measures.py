"""What rows are measured by, the same for every arm, whatever its own loop compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dedup.encoder import SentenceEncoder
from engine.dedup.rouge import RougeIndex
from engine.models import fetch

ROUGE, COSINE = 0.7, 0.9
Row = dict[str, str]


def text_of(row: Row) -> str:
    """What tells one row from another: what is asked, and about what."""
    return f"{row['instruction']}\n{row['input']}".strip()


def unit_vectors(rows: Sequence[Row], encoder: SentenceEncoder) -> NDArray[np.float32]:
    """What each row means; the product of two is their cosine."""
    vectors = encoder.encode([text_of(row) for row in rows])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def alike(rows: Sequence[Row], encoder: SentenceEncoder) -> dict[str, Any]:
    """``unique``: rows that are left when each that is too close to an earlier one, by words or by
    meaning, is taken out; ``pairs``: pairs above the cosine.
    """
    if not rows:
        return {"unique": 0, "pairs": 0}
    vectors = unit_vectors(rows, encoder)
    cosines = vectors @ vectors.T
    index, left = RougeIndex(ROUGE), list[int]()
    for place, row in enumerate(rows):
        near = left and cosines[place, left].max() > COSINE
        if not near and index.find(text_of(row)) is None:
            index.add(text_of(row))
            left.append(place)
    pairs = int((np.triu(cosines, 1) > COSINE).sum())
    return {"unique": len(left), "pairs": pairs}


def verb_pairs(rows: Sequence[Row]) -> int:
    """Distinct pairs of root verb and direct object in the instructions."""
    import spacy

    parser = spacy.load(fetch("en-core-web-sm"), exclude=["ner", "senter"])
    pairs = set()
    for parsed in parser.pipe([row["instruction"][:300] for row in rows]):
        root = next((token for token in parsed if token.head == token), None)
        thing = root and next((child for child in root.children if child.dep_ == "dobj"), None)
        if root is not None and root.pos_ == "VERB" and thing:
            pairs.add((root.lemma_.lower(), thing.lemma_.lower()))
    return len(pairs)


def distinct_3(rows: Sequence[Row], words: int) -> float | None:
    """Share of different trigrams among those of the first ``words`` words of the rows; None where
    they have not so many. It sinks with the length of a text, so all arms are cut alike.
    """
    text = re.findall(r"\w+", " ".join(f"{text_of(row)} {row['output']}" for row in rows).lower())
    if len(text) < words or words < 3:
        return None
    grams = list(zip(text[:words], text[1:words], text[2:words], strict=False))
    return len(set(grams)) / len(grams)


def words_in(rows: Sequence[Row]) -> int:
    """As ``distinct_3`` counts them."""
    return len(re.findall(r"\w+", " ".join(f"{text_of(row)} {row['output']}" for row in rows)))
