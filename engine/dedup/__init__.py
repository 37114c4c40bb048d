"""Near-duplicate rejection by exact text, ROUGE-L and meaning: each by itself, or as a cascade."""

from engine.dedup.cascade import Candidate, Cascade, Judgement
from engine.dedup.encoder import Encoder, SentenceEncoder
from engine.dedup.exact import ExactIndex, normalise
from engine.dedup.rouge import Hit, Nearest, RougeIndex, rouge_l, tokenize
from engine.dedup.semantic import SemanticIndex

__all__ = [
    "Candidate",
    "Cascade",
    "Encoder",
    "ExactIndex",
    "Hit",
    "Judgement",
    "Nearest",
    "RougeIndex",
    "SemanticIndex",
    "SentenceEncoder",
    "normalise",
    "rouge_l",
    "tokenize",
]
