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

from engine.backends.base import Failure, Verdict
from engine.records import Completion, Prompt, Usage

__all__ = ["ScriptedBackend", "alpaca_text"]

Answer = Callable[[Prompt], str]
Delay = Callable[[Prompt], float]
Fault = Callable[[Prompt, int], Verdict | None]
"""What attempt 1, 2, … of a prompt comes to; None: its answer."""

VERBS = (
    "Describe Explain Outline Summarise Criticise Invent Compare Rewrite List Suggest Plan "
    "Propose Identify Estimate Defend Translate Classify Improve Design Review Compose Discuss "
    "Analyse Recommend Simplify Imagine Correct Evaluate Predict Interpret"
).split()
OBJECTS = (
    "a-short-story three-arguments the-main-causes a-polite-email two-alternatives "
    "a-weekly-schedule an-opening-paragraph five-interview-questions a-convincing-slogan "
    "the-likely-consequences a-tender-poem one-common-mistake a-balanced-budget "
    "an-honest-apology a-training-plan four-historical-examples the-necessary-steps "
    "a-bedtime-fable an-angry-review a-job-advert several-synonyms a-legal-objection "
    "the-hidden-assumptions a-brief-biography an-unusual-metaphor a-fair-compromise "
    "six-warning-signs a-dinner-menu the-strongest-evidence a-radio-announcement "
    "an-emergency-procedure a-simple-experiment two-opposing-views a-farewell-speech "
    "the-grammatical-errors a-travel-itinerary"
).split()
LINKS = ("about concerning based-on inspired-by in-favour-of against related-to on").split()
MODIFIERS = (
    "medieval seasonal affordable underwater municipal neglected artificial edible volunteer "
    "coastal digital ancient nocturnal recycled competitive suburban solar endangered handmade "
    "statistical nomadic industrial imaginary diplomatic tropical wireless bilingual haunted "
    "organic elderly migratory wooden financial orbital vegetarian forgotten parliamentary "
    "veterinary classical portable"
).split()
NOUNS = (
    "gardening taxation bicycles lighthouses pottery vaccines glaciers libraries beekeeping "
    "railways sculpture insurance weddings orchards submarines astronomy fermentation bridges "
    "journalism chess earthquakes textiles swimming democracy carpentry proverbs fireworks "
    "irrigation opera kites archaeology nutrition windmills inheritance perfume sledges "
    "auctions calendars waterfalls cheese mathematics passports satellites tribunals umbrellas "
    "volcanoes debates harbours museums encryption tournaments compost translation hospitals "
    "lullabies vineyards"
).split()
TAILS = (
    "for-a-nervous-first-time-speaker without-using-any-numbers in-under-fifty-words "
    "as-a-lighthouse-keeper-would for-children-who-dislike-school with-one-surprising-fact "
    "from-the-buyer's-point-of-view before-the-deadline-on-Friday in-the-style-of-a-newsreader "
    "so-that-my-grandmother-agrees using-only-questions given-a-very-small-team "
    "and-rank-the-results for-readers-in-Nairobi while-staying-polite with-a-twist-at-the-end "
    "as-a-numbered-procedure for-somebody-moving-abroad and-justify-each-choice "
    "in-plain-everyday-words despite-heavy-rain for-a-village-of-two-hundred-people "
    "keeping-the-original-tone and-state-your-doubts in-the-year-2150 when-money-is-no-object "
    "for-an-audience-of-experts as-a-dialogue-between-rivals with-sources-to-check "
    "during-a-power-cut"
).split()
POPULAR = 1500
"""So many ideas come again and again, in one record of eight, as they do from a real model."""
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
        head = f"{position}. Instruction:" if position > number or not opened else ""
        parts.append(f"{head} {_record(bits, position)}")
    return "".join(parts)


def _record(bits: int, number: int) -> str:
    """One of some 10¹⁰ records, chosen by ``bits``."""
    if bits % 8 == 0:
        popular = (bits // 8) % POPULAR
        bits = int.from_bytes(hashlib.sha256(popular.to_bytes(4, "big")).digest(), "big")
    words = []
    for choices in (VERBS, OBJECTS, LINKS, MODIFIERS, NOUNS, TAILS, NOUNS, TAILS):
        bits, which = divmod(bits, len(choices))
        words.append(choices[which].replace("-", " "))
    verb, what, link, modifier, noun, tail, other, manner = words
    given = f"Notes on {other}, {manner}." if bits % 5 < 2 else "<noinput>"
    return (
        f"{verb} {what} {link} {modifier} {noun} {tail}.\n{number}. Input:\n{given}\n"
        f"{number}. Output:\nStart with {what} and leave {other} for later. {noun.capitalize()} "
        f"that are {modifier} deserve care: {verb.lower()} them {manner}, then look again {tail}, "
        f"since most people think of {other} first.\n###\n"
    )


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
