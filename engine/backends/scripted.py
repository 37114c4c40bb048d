"""Answers without a model: for tests, dry runs and the first look at a configuration.

``ScriptedBackend`` goes through the same seam as the real ones. An answer is a pure function of the
prompt, so two runs over the same plan get the same text whatever the order; delays and faults come
from functions of the prompt and the number of the attempt, so a test can say which request fails
how often.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence

import anyio

from engine.records import Completion, Prompt, Usage
from engine.retry import Failure, Verdict

__all__ = ["ScriptedBackend", "alpaca_text"]

Answer = Callable[[Prompt], str]
Delay = Callable[[Prompt], float]
Fault = Callable[[Prompt, int], Verdict | None]
"""What attempt 1, 2, … of a prompt comes to; None: its answer."""

TEMPLATES = (
    "Write a {adjective} {text} about {topic} for {person}.",
    "Explain how {topic} affects {place} and name two {adjective} consequences.",
    "Suggest three {adjective} ways in which {person} could {task} without {obstacle}.",
    "Compare {topic} with {other} from the point of view of {person}.",
    "Given the following {text}, decide whether its tone is {adjective} and say why.",
    "What should {person} know about {topic} before they {task}?",
    "Rewrite the {text} below so that {person} can understand {topic}.",
    "List five questions that {person} might ask about {topic} in {place}.",
    "Plan a {adjective} weekend in {place} for {person} who cares about {topic}.",
    "Convert this {adjective} {text} about {topic} into a short dialogue.",
    "Calculate what it costs {person} to {task} in {place}, and state your assumptions.",
    "Identify the main argument against {topic} and answer it as {person} would.",
)
WORDS = {
    "adjective": (
        "brief formal playful honest cautious vivid technical modern sceptical gentle thorough "
        "surprising balanced practical unusual elegant persuasive neutral"
    ),
    "text": (
        "letter poem recipe speech review summary proposal fable diary-entry press-release sonnet "
        "memo toast eulogy riddle complaint apology lesson"
    ),
    "topic": (
        "photosynthesis inflation recycling migration honesty chess astronomy pottery sailing "
        "nutrition geometry democracy volcanoes vaccination jazz-history beekeeping glaciers "
        "encryption soil-erosion public-transport earthquakes probability medieval-trade "
        "ocean-currents sleep urban-farming rainfall fermentation antibiotics copyright"
    ),
    "other": (
        "gravity friendship electricity grammar composting philosophy carpentry swimming taxation "
        "meditation algebra journalism bread-baking archaeology insurance origami forestry optics"
    ),
    "person": (
        "a-carpenter a-new-parent the-mayor a-retired-nurse an-apprentice a-shy-student "
        "your-grandmother a-night-porter the-head-chef a-bus-driver an-exchange-student "
        "a-beekeeper a-young-judge the-librarian a-tired-teacher a-fisherman"
    ),
    "place": (
        "Lisbon Nairobi a-mountain-village Montreal a-desert-town Osaka the-suburbs Krakow "
        "a-fishing-harbour Wellington Oaxaca a-university-town the-Arctic-coast Kerala"
    ),
    "task": (
        "repair-a-bicycle learn-a-language start-a-choir save-for-a-house organise-a-library "
        "teach-fractions grow-tomatoes settle-a-quarrel run-a-marathon sell-old-furniture "
        "host-a-debate cross-the-Alps open-a-bakery renovate-a-kitchen"
    ),
    "obstacle": (
        "spending-money leaving-home special-tools a-deadline prior-knowledge electricity "
        "help-from-friends an-internet-connection working-at-night"
    ),
}
SLOTS = {slot: [w.replace("-", " ") for w in words.split()] for slot, words in WORDS.items()}
OPEN_NUMBER = re.compile(r"(\d+)\. Instruction:\s*$")


def alpaca_text(prompt: str, *, seed: int | None = None, records: int = 3) -> str:
    """A continuation of Alpaca's prompt: ``records`` numbered records with input and output.

    Goes on after the open ``N. Instruction:`` at the prompt's end. A pure function.
    """
    opened = OPEN_NUMBER.search(prompt[-64:])
    number = int(opened[1]) if opened else 1
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    parts = []
    for position in range(number, number + records):
        bits = int.from_bytes(hashlib.sha256(digest + position.to_bytes(4, "big")).digest(), "big")
        bits, which = divmod(bits, len(TEMPLATES))
        chosen = {}
        for slot, words in SLOTS.items():
            bits, rest = divmod(bits, len(words))
            chosen[slot] = words[rest]
        instruction = TEMPLATES[which].format_map(chosen)
        given = (
            "The {adjective} {text} that {person} kept." if "below" in instruction else "<noinput>"
        )
        output = (
            "It depends on {topic}. In {place}, {person} would begin with a {adjective} {text}, then "
            "{task}, and only later turn to {other}, since {obstacle} is what most people fear."
        )
        head = f"{position}. Instruction:" if position > number or not opened else ""
        parts.append(
            f"{head} {instruction}\n{position}. Input:\n{given.format_map(chosen)}\n"
            f"{position}. Output:\n{output.format_map(chosen)}\n###\n"
        )
    return "".join(parts)


def _alpaca(prompt: Prompt) -> str:
    return alpaca_text(prompt.text, seed=prompt.sampling.seed)


class ScriptedBackend:
    """See ``engine.backends.base.Backend``.

    ``answer`` gives the text, ``delay_s`` how long a call takes, ``fault`` what goes wrong.
    """

    def __init__(
        self,
        answer: Answer = _alpaca,
        *,
        name: str = "scripted",
        model: str = "scripted",
        delay_s: float | Delay = 0.0,
        fault: Fault | None = None,
        context_length: int | None = 4096,
        max_in_flight: int | None = 64,
    ) -> None:
        self.name = name
        self.model = model
        self.context_length = context_length
        self.max_in_flight = max_in_flight
        self.calls: Counter[int] = Counter()
        """Attempts of each prompt, by its index."""
        self._answer = answer
        self._delay_s = delay_s
        self._fault = fault

    async def start(self) -> None:
        """Nothing to load."""

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        delay_s = self._delay_s
        wait_s = max(map(delay_s, prompts)) if callable(delay_s) else delay_s
        await anyio.sleep(wait_s)
        return [self._one(prompt, wait_s) for prompt in prompts]

    def _one(self, prompt: Prompt, latency_s: float) -> Completion | BaseException:
        self.calls[prompt.index] += 1
        verdict = self._fault(prompt, self.calls[prompt.index]) if self._fault else None
        if verdict is not None:
            return Failure(verdict)
        text = self._answer(prompt)
        return Completion(
            text=text,
            finish_reason="stop",
            usage=Usage(prompt_tokens=_count(prompt.text), completion_tokens=_count(text)),
            model=self.model,
            latency_s=latency_s,
        )

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return [_count(text) for text in texts]

    async def aclose(self) -> None:
        """Nothing to release."""


def _count(text: str) -> int:
    """Words: good enough for a model that does not exist."""
    return len(text.split())
