"""The two pictures that need a library: a map of the rows, and their verbs with their objects.

The map puts rows that mean the same side by side: the two main components (PCA) of the
embeddings that the run compared, coloured by the groups that k-means finds in them. A run without
embeddings is mapped by its words (hashed, weighted by rarity, reduced by a singular value
decomposition). Two components show the coarse order only: far apart is different, close need not
be alike.

The verbs are Self-Instruct's figure (https://arxiv.org/abs/2212.10560, figure 2): the root verb of
an instruction and its direct object. They are found by spaCy's small English model. The price of
both: some seconds, and a sample where a run is large.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import models
from engine.dedup.rouge import tokenize
from engine.errors import ConfigError
from engine.languages import ENGLISH, language_of
from engine.report.shape import shape_of
from engine.store import RunReader
from engine.text import shorten

__all__ = ["NEEDED", "rows_map", "verbs"]

NEEDED = "the pictures need more packages: pip install 'woolmill[report]'"
POINTS = 4000
GROUPS = 10
"""As many as can be told apart by colour."""
SMALLEST = 8
"""Rows that make a group, on average."""
APART = 2.0
"""How many times better groups must stand apart than those that k-means finds in as much noise:
else colours would show a difference that is none.
"""
COMPARED = 1000
"""Rows whose silhouette is taken."""
SENTENCES = 2000
VERBS, OBJECTS = 20, 4
"""As in Self-Instruct's figure."""
PARSER = "en-core-web-sm"
MAX_CHARS = 300
"""Of a text; the root verb stands early, and parsing takes time by the word."""


def rows_map(run: RunReader) -> dict[str, Any]:
    """Points ``[x, y, group, text, id]`` of an even sample of the accepted rows, the groups'
    telling words, and what the places follow from.

    Raises ConfigError where scikit-learn is missing.
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError as exc:
        raise ConfigError(NEEDED) from exc
    language = run.manifest.decision.get("language", ENGLISH)
    step = max(1, run.counts().accepted // POINTS)
    sample = list(islice(run.accepted(vectors=True), 0, POINTS * step, step))
    rows = [decision for decision, _ in sample]
    shape = shape_of(run)
    texts = [shape.told_by(d.record) for d in rows]
    vectors = [vector for _, vector in sample if vector is not None]
    if len(rows) < 3:
        return {
            "by": "nothing: fewer than three rows",
            "rows": len(rows),
            "groups": [],
            "points": [],
        }
    if len(vectors) == len(rows):
        by, space = "the embeddings' two main components", np.stack(vectors)
    else:
        by = f"the {shape.noun}s' words (not all rows have embeddings)"
        space = _by_words(texts, language)
    groups = _groups(space)
    places = PCA(2, random_state=0).fit_transform(space)
    names = _telling_words(texts, groups, language)
    return {
        "by": by,
        "rows": len(rows),
        "groups": names if len(names) > 1 else [],
        "points": [
            [
                round(float(x), 4),
                round(float(y), 4),
                int(g),
                shorten(text, 140),
                f"{d.index}.{d.position}",
            ]
            for (x, y), g, text, d in zip(places, groups, texts, rows, strict=True)
        ],
    }


def _groups(space: NDArray[np.float32]) -> NDArray[np.int64]:
    """A group for each row: as many as stand apart best, or all in one where none do."""
    most = min(GROUPS, len(space) // SMALLEST)
    found = [_grouped(space, count) for count in range(2, most + 1)]
    apart, groups = max(found, key=lambda each: each[0], default=(0.0, None))
    if groups is None:
        return np.zeros(len(space), np.int64)
    noise = np.random.default_rng(0).normal(size=space.shape).astype(np.float32)
    by_chance, _ = _grouped(noise, int(groups.max()) + 1)
    return groups if apart > APART * max(by_chance, 0.0) else np.zeros(len(space), np.int64)


def _grouped(space: NDArray[np.float32], count: int) -> tuple[float, NDArray[np.int64]]:
    """So many groups by k-means, and how far apart they stand: the mean silhouette."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    with warnings.catch_warnings():  # fewer different rows than groups
        warnings.simplefilter("ignore")
        groups = KMeans(count, n_init=2, random_state=0).fit_predict(space)
    if len(set(groups)) < count:
        return 0.0, np.zeros(len(space), np.int64)
    compared = min(COMPARED, len(space))
    apart = silhouette_score(space, groups, sample_size=compared, random_state=0)
    return float(apart), groups


def _words(text: str, language: str) -> list[str]:
    """The words of a text; where they do not stand apart, pairs of neighbouring characters."""
    tokens = tokenize(text, language)
    if language_of(language).spaced:
        return tokens
    return [f"{one}{two}" for one, two in pairwise(tokens)]


def _by_words(texts: Sequence[str], language: str) -> NDArray[np.float32]:
    """Thirty-two components of the texts' words: (N, 32)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    if language == ENGLISH:
        counted = HashingVectorizer(n_features=2**13, stop_words="english", alternate_sign=False)
    else:
        counted = HashingVectorizer(
            n_features=2**13, analyzer=partial(_words, language=language), alternate_sign=False
        )
    words = counted.transform(texts)
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(words)
    return np.asarray(TruncatedSVD(32, random_state=0).fit_transform(weighted), np.float32)


def _telling_words(
    texts: Sequence[str], groups: NDArray[np.int64], language: str = ENGLISH
) -> list[str]:
    """For each group the three words that its texts have far more often than the others'."""
    shortest = 3 if language_of(language).spaced else 1
    everywhere: Counter[str] = Counter()
    within: dict[int, Counter[str]] = defaultdict(Counter)
    for text, group in zip(texts, groups, strict=True):
        words = {word for word in _words(text, language) if len(word) > shortest}
        everywhere.update(words)
        within[int(group)].update(words)
    sizes = Counter(int(group) for group in groups)
    names = []
    for group in range(len(sizes)):
        weight = {
            word: n / sizes[group] * np.log(len(texts) / everywhere[word])
            for word, n in within[group].items()
        }
        names.append(" · ".join(sorted(weight, key=lambda word: (-weight[word], word))[:3]))
    return names


def verbs(run: RunReader) -> dict[str, Any]:
    """The twenty most frequent root verbs, each with its four most frequent direct objects.

    Raises ConfigError where spaCy is missing, and as ``models.fetch`` does where its model is.
    """
    try:
        import spacy
    except ImportError as exc:
        raise ConfigError(NEEDED) from exc
    # A folder, not a name: spaCy imports a package of that name. Its files have their hashes, so
    # its configuration, which may name any registered function, is the one that was read.
    parser = spacy.load(models.fetch(PARSER), exclude=["ner", "senter"])
    step = max(1, run.counts().accepted // SENTENCES)
    rows = islice(run.decisions(accepted=True), 0, SENTENCES * step, step)
    shape = shape_of(run)
    texts = [shape.told_by(d.record)[:MAX_CHARS] for d in rows if d.record]
    pairs: Counter[tuple[str, str]] = Counter()
    for parsed in parser.pipe(texts, batch_size=128):
        root = next((token for token in parsed if token.head == token), None)
        if root is None or root.pos_ != "VERB":
            continue
        thing = next((child for child in root.children if child.dep_ == "dobj"), None)
        if thing is not None:
            pairs[root.lemma_.lower(), thing.lemma_.lower()] += 1
    of_verb: Counter[str] = Counter()
    for (verb, _), count in pairs.items():
        of_verb[verb] += count
    return {
        "by": "spaCy's en_core_web_sm",
        "parsed": len(texts),
        "with_object": sum(pairs.values()),
        "pairs": len(pairs),
        "distinct": len(of_verb),
        "verbs": [
            {
                "verb": shorten(verb, 24),
                "rows": count,
                "objects": [
                    [shorten(thing, 24), n]
                    for (of, thing), n in sorted(pairs.items(), key=lambda p: (-p[1], p[0]))
                    if of == verb
                ][:OBJECTS],
            }
            for verb, count in sorted(of_verb.items(), key=lambda v: (-v[1], v[0]))[:VERBS]
        ],
    }
