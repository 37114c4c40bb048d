"""Whether a recipe keeps what it promises: the same prompts and rows in any process, and no answer
that its parser fails at.

``check`` runs this module twice, in processes that hash texts differently, and compares what they
made. A process reads one order as JSON and writes what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn

import orjson

from engine import errors
from engine.decide.decider import Decider
from engine.dedup.cascade import Cascade
from engine.errors import InputError, WoolmillError
from engine.processes.children import environment, how_it_ended, python_command, start
from engine.recipes import guard
from engine.recipes.base import RECIPE_ERROR, Recipe, drawn
from engine.recipes.guard import NotAsked, RecipeFault
from engine.records import Answer, Completion, Decision, Prompt, Record, Usage
from engine.run.generate import make_prompts
from engine.run.preview import Given
from engine.run.settle import Settled, settle, stages_of
from engine.settings import RunConfig

__all__ = ["Report", "check"]

PROMPTS = 20
"""Prompts that are made, and rows of each verdict that are looked at. A mistake shows in the first
few or depends on the row, of which no number would see all."""
ANSWERS = 1_000
"""Whole answers, cut and spoilt in so many ways: some seconds for a recipe in order."""
HASH_SEEDS = ("1", "2")
"""Values of PYTHONHASHSEED: sets of strings have another order under each, so a recipe that depends
on it makes other prompts."""
SLOW_S = 2.0
"""For one prompt or one answer; those of real recipes take microseconds."""
LONGEST_S = 300.0
"""For the process as a whole. Its own limits end what Python can interrupt, within seconds."""
MOST_FAULTS = 10
"""Lines that a person is shown; more would say the same."""
LONG_CHARACTERS = 50_000
"""Of answers that a parser of quadratic time fails at: there it takes minutes, a linear one
milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was seen."""

    prompts: int
    answers: int
    rows: int
    reasons: dict[str, int]
    """How often answers, or parts of them, were refused, by reason."""
    slowest_s: float
    faults: tuple[str, ...]
    """A line each; empty: the recipe is sound as far as this can tell."""


def check(config: RunConfig, answer: str | None = None) -> Report:
    """Try the recipe of ``config`` out in two processes, each of its stages.

    ``answer`` is a real answer of the first stage to begin with.

    Raises WoolmillError where the recipe cannot be loaded.
    """
    order = {"config": config.model_dump(mode="json", exclude_unset=True), "answer": answer}
    first, second = (_ask(order, seed) for seed in HASH_SEEDS)
    faults = list(dict.fromkeys([*first["faults"], *second["faults"]]))
    for one, other in zip(first["seen"], second["seen"], strict=False):
        if one != other:
            faults.append(
                f"{one[0]}: two processes came to different results; sort what is a set, and leave "
                "out clocks and random"
            )
            break
    return Report(
        prompts=first["prompts"],
        answers=first["answers"],
        rows=first["rows"],
        reasons=first["reasons"],
        slowest_s=max(first["slowest_s"], second["slowest_s"]),
        faults=tuple(faults[:MOST_FAULTS]),
    )


def _ask(order: dict[str, Any], hash_seed: str) -> dict[str, Any]:
    """What a process that hashes texts by ``hash_seed`` sees."""
    process = start(
        python_command("-m", "engine.run.check"),
        environment("engine") | {"PYTHONHASHSEED": hash_seed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            said, _ = process.communicate(orjson.dumps(order), timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"the recipe did not come to an end within {LONGEST_S:g} s; it holds something "
                "that cannot be interrupted"
            ) from None
        finally:
            process.kill()
    if process.returncode or not said:
        raise InputError(f"the recipe's process ended {how_it_ended(process.returncode)}")
    seen: dict[str, Any] = orjson.loads(said)
    if "error" in seen:
        raise getattr(errors, seen["error"])(seen["message"])
    return seen


# The process's side


class _Seen:
    """What a recipe does, collected."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.faults: dict[str, None] = {}
        self.slowest_s = 0.0
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, what: str, came: Any) -> bool:
        """Keep what ``what`` came to. Whether to go on: not after something that was slow."""
        seconds = time.perf_counter() - self._began
        self.slowest_s = max(self.slowest_s, seconds)
        text = json.dumps(came, sort_keys=False, default=repr)
        self.seen.append((what, sha256(text.encode()).hexdigest()[:16]))
        slow = seconds >= min(SLOW_S, guard.LIMIT_S)
        if slow:
            self.fault(f"{what}: took {seconds:.1f} s")
        return not slow

    def fault(self, line: str) -> None:
        self.faults[line] = None


def _observe(config: RunConfig, answer: str | None) -> dict[str, Any]:
    seen, reasons = _Seen(), Counter[str]()
    prompts = answers = rows = 0
    given: list[Record] | None = None
    for settled in stages_of(settle(config, asks=False), asks=False):
        came = _Stage(settled, seen, given)
        came.ask()
        came.answer(_begin_with(settled.recipe, answer))
        prompts, answers = prompts + len(came.made), answers + came.answers
        rows += came.rows
        reasons += came.reasons
        given, answer = came.gave(), None
    return {
        "prompts": prompts,
        "answers": answers,
        "rows": rows,
        "reasons": dict(reasons.most_common()),
        "seen": seen.seen,
        "slowest_s": seen.slowest_s,
        "faults": list(seen.faults),
    }


class _Stage:
    """One stage of a recipe, tried out; of most recipes the one that there is."""

    def __init__(self, settled: Settled, seen: _Seen, given: list[Record] | None) -> None:
        self._settled = settled
        self._seen = seen
        self._given = given
        name = settled.config.stage.rpartition("/")[2]
        self._of = f"stage {name}: " if name else ""
        self.made: list[Prompt] = []
        self.answers = self.rows = 0
        self.reasons: Counter[str] = Counter()
        self._records: dict[bool, list[Record]] = {True: [], False: []}

    def ask(self) -> None:
        """Make the first prompts."""
        prompts = make_prompts(self._settled, None if self._given is None else Given(self._given))
        for index in range(PROMPTS):
            what, came = f"{self._of}the prompt of request {index}", None
            self._seen.begin()
            try:
                prompt = prompts.prompt(index)
                if prompt is None:
                    break
                self.made.append(prompt)
                came = _said(prompt)
            except RecipeFault as fault:
                came = str(fault)
                if not isinstance(fault, NotAsked):
                    self._seen.fault(f"{self._of}prompt: {fault}")
            if not self._seen.end(what, came):
                break

    def answer(self, whole: Sequence[str]) -> None:
        """Have ``ANSWERS`` answers decided, which are damages of ``whole``."""
        config = self._settled.config
        decider = Decider(
            self._settled.recipe, Cascade(None), seed=config.seed, samples=config.samples or 1
        )
        for what, text, finish in _answers(whole) if self.made else ():
            asked = self.made[self.answers % len(self.made)]
            self._seen.begin()
            answered = _answered(self.answers, asked, text, finish)
            decisions, _ = decider.decide([answered], limit=1 << 40)
            self.answers += 1
            for decision in decisions:
                self._take(decision, what)
            came = [[d.reason, d.record, d.detail] for d in decisions]
            if not self._seen.end(f"{self._of}the rows of {what}", came):
                break

    def _take(self, decision: Decision, what: str) -> None:
        if decision.reason == RECIPE_ERROR:
            self._seen.fault(f"{self._of}parse: {decision.detail}, of {what}")
        if decision.reason is None or decision.reason.startswith("duplicate"):
            self.rows += 1
        else:
            self.reasons[decision.reason] += 1
        kept = self._records[decision.accepted]
        if decision.record is not None and len(kept) < PROMPTS and _is_unicode(decision.record):
            kept.append(decision.record)

    def gave(self) -> list[Record]:
        """Rows for the stage behind: those accepted, else refused ones, else one made up."""
        made_up: Record = dict.fromkeys(self._settled.recipe.fields, "Something.")
        return self._records[True] or self._records[False] or [made_up]


def _is_unicode(record: Record) -> bool:
    """Whether a row of a damaged answer can be asked about; half of a surrogate pair cannot."""
    try:
        orjson.dumps(record)
    except TypeError:
        return False
    return True


def _said(prompt: Prompt) -> Any:
    turns = [[turn.role, turn.content] for turn in prompt.chat]
    sampling = prompt.sampling
    return [turns, sampling.stop, sampling.seed, dict(sampling.extra), prompt.demonstrations]


def _answered(index: int, asked: Prompt, text: str, finish: str) -> Answer:
    usage = Usage(prompt_tokens=1, completion_tokens=1, estimated=True)
    completion = Completion(text=text, finish_reason=finish, usage=usage, api=asked.api)
    return Answer(
        index=index, demonstrations=asked.demonstrations, completion=completion, row=asked.row
    )


GENERIC = (
    'Here it is:\n```json\n{"question": "Why?", "answer": "So.", "score": 4}\n```\n',
    "1. Why is the sky blue?\n2. Who built the first lighthouse?\n",
    "<question>Why?</question>\n<answer>Because.</answer>\n",
    " Name two rivers.\n1. Input:\n<noinput>\n1. Output:\nThe Rhine and the Po.\n###\n",
    "Water boils at 100 degrees.\n\nQ: At sea level?\nA: Yes. Score: 4/5\n",
)
"""Where a recipe has no example of its answers."""


def _begin_with(recipe: Recipe, answer: str | None) -> Sequence[str]:
    if answer is not None:
        return (answer,)
    sample = getattr(recipe, "sample_answer", None)
    return GENERIC if sample is None else (sample(),)


def _answers(whole: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """``ANSWERS`` answers: what each is, its text and why it ended."""
    made = [each for text in whole for each in _damaged(text)]
    cuts = max(1, (ANSWERS - len(made)) // (2 * len(whole)))
    for text in whole:
        lengths = sorted({round(len(text) * part / cuts) for part in range(1, cuts + 1)})
        made += [
            (f"an answer cut after {length} characters", text[:length], finish)
            for length in lengths
            for finish in ("length", "stop")
        ]
    made += [
        (f"an answer with change {number}", _changed(whole, number), "stop")
        for number in range(len(made), ANSWERS)
    ]
    yield from made[:ANSWERS]


def _damaged(text: str) -> Iterator[tuple[str, str, str]]:
    kinds = {
        "a good answer": text,
        "an empty answer": "",
        "a blank answer": " \n\t\n",
        "a fenced answer": f"```\n{text}\n```",
        "an answer in a fence that is not closed": f"```json\n{text}",
        "an answer after thoughts": f"<think>\nHm: {text[:40]}\n</think>\n\n{text}",
        "an answer after bare thoughts": f"Hm.\n</think>\n{text}",
        "thoughts alone": f"<think>{text}",
        "an answer twice": f"{text}\n{text}",
        "an answer with words around it": f"Sure! Here it is:\n\n{text}\n\nShall I go on?",
        "an answer with opening brackets too many": "[{(<" + text,
        "an answer without closing brackets": text.translate(str.maketrans("", "", "]})>")),
        "an answer without quotes": text.replace('"', ""),
        "an answer with carriage returns": text.replace("\n", "\r\n"),
        "an answer on one line": text.replace("\n", " "),
        "an answer with its lines in reverse": "\n".join(reversed(text.split("\n"))),
        "an answer in capitals": text.upper(),
        "an answer with null characters": text.replace(" ", "\0"),
        "an answer with half of a surrogate pair": text[:20] + "\ud800" + text[20:],
        "a refusal in words": "I am sorry, but I cannot help with that.",
        "a long loop": text[:200] * (LONG_CHARACTERS // max(1, len(text[:200]))),
        "many opening brackets": "[" * LONG_CHARACTERS,
        "many line feeds": "\n" * LONG_CHARACTERS,
        "many tags": "<a>" * (LONG_CHARACTERS // 3),
    }
    for what, damaged in kinds.items():
        yield what, damaged, "stop"
        yield f"{what}, cut", damaged, "length"


def _changed(whole: Sequence[str], number: int) -> str:
    """An answer with some characters left out, doubled or exchanged."""
    text = list(whole[number % len(whole)])
    for change in range(1 + number % 5):
        if not text:
            break
        bits = drawn(number, change)
        at, other = bits % len(text), (bits >> 32) % len(text)
        if bits >> 60 < 6:
            del text[at]
        elif bits >> 60 < 11:
            text.insert(at, text[other])
        else:
            text[at], text[other] = text[other], text[at]
    return "".join(text)


def main() -> NoReturn:
    """Take the order, and keep standard output for what was seen."""
    order = orjson.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the recipe prints
    try:
        seen = _observe(RunConfig.model_validate(order["config"]), order["answer"])
    except WoolmillError as error:
        seen = {"error": type(error).__name__, "message": str(error)}
    with out:
        out.write(orjson.dumps(seen))
    sys.exit(0)


if __name__ == "__main__":
    main()
