"""Prove, before training starts, that the loss of a packed row is the model's own.

Whether an architecture can be packed does not follow from its name: some have layers that run over
a record's border (recurrences, convolutions), some build their masks where nobody can reach them,
some do more to their logits than a linear layer does. So it is tried: two short records are laid
out as training lays them out and sent through the model, on its real weights, and every logit is
compared with the model's own, which sees each record alone through its own attention. The first of
these ways that agrees is taken:

    several records a row     attention inside each of them (trainer/attention.py)
    one record a row          the same attention; for recurrent and hybrid models
    one record a row          the architecture's own attention: masks of its own, ALiBi, chunks

and a model that none of them fits is refused. The price: a few forward passes of 30 tokens, on the
processor, before the model is handed out.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.attention import ALONE, IMPLEMENTATION
from trainer.errors import ConfigError
from trainer.packing import collate
from trainer.tokens import Tokenised

__all__ = ["WAYS", "choose_way", "export_difference", "live_answer", "say_way", "set_way"]

WAYS = {
    IMPLEMENTATION: "",
    ALONE: "its layers carry one record of a row into the next",
    "sdpa": "its attention is its own (sdpa)",
    "eager": "its attention is its own (eager)",
}
"""Names that ``set_attn_implementation`` takes, in the order of our liking, and why not the one
before."""

_LENGTHS = (11, 17)
"""Tokens of the two records: both longer than ``_WINDOW``, and unlike, so that a mix-up shows."""
_LIMIT = 1e-4
"""Of the difference between log-probabilities, as a share of their spread."""
_ROUNDING = 2e-5
"""What float32 may make of it: 3e-6 in a model of thirty layers."""

_FAULTS = (
    *(AttributeError, IndexError, KeyError, NotImplementedError),
    *(RuntimeError, StopIteration, TypeError, ValueError),
)
"""What an architecture raises that cannot be called like this."""

_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
"""Attributes by which transformers' layers and configurations bound how far attention reaches back.
"""
_WINDOW = 5
"""While it is tried, no window is longer than this, so that a window which the short records would
not fill cannot be forgotten."""


def choose_way(model: Any) -> str:
    """Set the attention of ``model`` (a ``TokenLoss``) to the first of :data:`WAYS` that computes
    what the architecture does; its name.

    Raises:
        ConfigError: none does.
    """
    hf = model.hf
    was_training = hf.training
    hf.eval()
    errors: dict[str, float] = {}
    try:
        # A router may be torn between two experts to the last bit; not with other records too.
        for seed in range(2):
            records = _records(hf.config.get_text_config().vocab_size, seed)
            with torch.no_grad(), _short_windows(hf):
                set_way(hf, "eager")
                own = _all_own(hf, records)
                for way in WAYS:
                    if set_way(hf, way):
                        error = _difference(model, records, own)
                        errors[way] = min(error, errors.get(way, error))
                        if error <= _ROUNDING:
                            break
            # In a very deep model rounding alone is more; then it is so for every way.
            limit = min(_LIMIT, max(_ROUNDING, 4 * min(errors.values(), default=0.0)))
            for way, error in errors.items():
                if error <= limit:
                    set_way(hf, way)
                    return way
    finally:
        hf.train(was_training)
    raise ConfigError(
        f"{type(hf).__name__}: what is computed for training is not what the architecture computes"
        f" (log-probabilities differ by {min(errors.values(), default=1.0):.1e} of their spread);"
        " this architecture cannot be trained here"
    )


def say_way(hf: Any) -> str:
    """One line for the person: why records of this model cannot share rows."""
    why = WAYS[hf.config._attn_implementation]
    return f"{type(hf).__name__}: one record a row, not packed: {why}"


def live_answer(model: Any, device: torch.device) -> Tensor:
    """Log-probabilities (N, V) of two short records by ``model`` as it is now, sharded or not.
    Collective.
    """
    records = _records(model.hf.config.get_text_config().vocab_size, seed=0)
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(collate(records, packing=model.packs).to(device), logits=True)
    model.train()
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def export_difference(hf: Any, live: Tensor) -> float:
    """How far the model ``hf``, opened from an export, is from what :func:`live_answer` was: at the
    median position, since a wrong export is wrong at all of them.

    The mean of all would follow one: where random tokens drive an activation to its extreme,
    rounding to 16 bits moves that position's answer by more than its spread, in sound models too.
    """
    records = _records(hf.config.get_text_config().vocab_size, seed=0)
    with torch.no_grad():
        ours = torch.cat([_own(hf.eval(), record) for record in records])
    differences = [_apart(*both, spread=_spread(live)) for both in zip(ours, live, strict=True)]
    return statistics.median(differences)


def _records(vocabulary: int, seed: int) -> list[Tokenised]:
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = [generator.integers(0, vocabulary, n).astype(np.int32) for n in _LENGTHS]
    return [Tokenised(each, np.arange(len(each)) > 0) for each in ids]


def _all_own(hf: Any, records: list[Tokenised]) -> list[Tensor]:
    try:
        return [_own(hf, record) for record in records]
    except _FAULTS as exc:
        raise ConfigError(
            f"{type(hf).__name__}: cannot be asked for the next token of a text alone"
            f" ({type(exc).__name__}); this architecture cannot be trained here"
        ) from exc


def _own(hf: Any, record: Tokenised) -> Tensor:
    """The architecture's own log-probabilities (T - 1, V)."""
    ids = torch.from_numpy(record.ids).long()[None]
    return torch.log_softmax(hf(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)


def _difference(model: Any, records: list[Tokenised], own: list[Tensor]) -> float:
    """How far ``model``'s log-probabilities of ``records``, laid out together, are from ``own``."""
    batch = collate(records, packing=model.packs)
    try:
        ours = torch.log_softmax(model(batch, logits=True), dim=-1)
    except _FAULTS:
        return float("inf")  # it cannot be called like this at all
    return _apart(ours, torch.cat(own))


def _spread(answer: Tensor) -> Tensor:
    return (answer - answer.mean()).square().mean().sqrt()


def _apart(ours: Tensor, theirs: Tensor, spread: Tensor | None = None) -> float:
    """The root of the mean square of the differences, as a share of the spread of all."""
    error = (ours - theirs).square().mean().sqrt()
    error = error / (_spread(theirs) if spread is None else spread)
    return float(error) if torch.isfinite(error) else float("inf")


def set_way(hf: Any, way: str) -> bool:
    """Make ``hf`` compute its attention by ``way``; False if its architecture says that it has no
    such thing.
    """
    if not hf._can_set_attn_implementation():
        # Its attention is what it is; but how it builds its masks follows from the name.
        hf.config._attn_implementation = way
        return True
    try:
        hf.set_attn_implementation(way)
    except (ValueError, ImportError):
        return False
    return bool(hf.config._attn_implementation == way)


@contextlib.contextmanager
def _short_windows(hf: Any) -> Iterator[None]:
    places = [hf.config, hf.config.get_text_config(), *hf.modules()]
    kept = [
        (place, name, place.__dict__[name])
        for place in places
        for name in _WINDOWS
        if isinstance(place.__dict__.get(name), int) and place.__dict__[name] > _WINDOW
    ]
    for place, name, _ in kept:
        setattr(place, name, _WINDOW)
    try:
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)
