"""What refusals say of the limit: a script of requests, and the bound after it."""

from __future__ import annotations

import math

import pytest

from engine.limits.controller import Ticket
from engine.limits.finder.refusals import Refusals

REFUSAL_S = 0.03


class Script:
    """Requests to a witness, all at the level that it allows, up to ``most``."""

    def __init__(self, most: float = 64.0) -> None:
        self.witness = Refusals()
        self.most = most
        self.now_s = 0.0
        self.sent = 0

    @property
    def level(self) -> float:
        return min(self.witness.bound.most, self.most)

    def send(self, in_flight: int) -> Ticket:
        self.sent += 1
        ticket = Ticket(self.now_s, 0.0, in_flight, self.sent)
        self.witness.sent(self.now_s, ticket)
        self.now_s += 0.001
        return ticket

    def refuse(self, ticket: Ticket, wait_s: float | None = None, left: int | None = None) -> float:
        """The bound after ``ticket`` was refused, with ``left`` in flight."""
        self.now_s = max(self.now_s, ticket.at_s + REFUSAL_S)
        left = ticket.in_flight - 1 if left is None else left
        self.witness.refused(
            self.now_s, ticket, wait_s, in_flight=left, sent=self.sent, latency_s=0.1
        )
        self.now_s += 0.001
        return self.witness.bound.most

    def answer(self, count: int) -> float:
        """The bound after so many requests were sent and answered one after the other."""
        for _ in range(count):
            ticket = self.send(int(self.level))
            self.now_s += 0.1
            self.witness.answered(self.now_s, ticket, 0.1)
        return self.witness.bound.most

    def find(self, held: int, wait_s: float | None = None) -> float:
        """Three in a row are refused where ``held`` are in flight."""
        return [self.refuse(self.send(held + 1), wait_s) for _ in range(3)][-1]

    def step_refused(self, answers: int) -> int:
        """Answers until a step is tried, where the request beyond is refused as often as proves
        it; no more than ``answers``.
        """
        for count in range(answers + 1):
            if "trying a little more" in self.witness.bound.why:
                while "trying" in self.witness.bound.why:
                    self.refuse(self.send(int(self.level)))
                return count
            self.answer(1)
        raise AssertionError("no step")


@pytest.mark.parametrize(
    ("held", "first"),
    [(40, 38), (100, 95), (4, 4), (1, 1)],  # nothing off a handful
)
def test_the_first_cut_is_small_and_exact(held: int, first: float) -> None:
    """A twentieth of what the server held, which was counted; after ten answers back to it."""
    script = Script(most=2 * held)
    for _ in range(2):
        assert script.refuse(script.send(held + 1)) == math.inf  # may be chance
    assert script.refuse(script.send(held + 1)) == first
    assert script.witness.bound.why == f"refused with {held} in flight"
    assert script.answer(9) == first
    assert script.answer(1) == held


def test_a_wave_is_one_cut() -> None:
    """Twenty that were under way are refused too: what the server held is what was taken."""
    script = Script()
    wave = [script.send(in_flight) for in_flight in range(41, 63)]
    for left, ticket in zip(range(61, 39, -1), wave, strict=True):
        script.refuse(ticket, left=left)
    assert script.witness.bound == (38.0, "refused with 40 in flight")


def test_cutting_again_is_hard() -> None:
    """Nothing was taken since the first cut: the server holds far fewer."""
    script = Script()
    first = script.find(40)
    assert script.find(int(first) - 1) == math.ceil(0.7 * (first - 1))
    assert script.witness.paused_until_s > script.now_s


def test_a_step_beyond_is_paid_for_by_answers() -> None:
    """The first after a cut comes soon, the next after 160 answers for each that was refused."""
    script = Script()
    script.find(40)
    script.answer(10)
    assert script.step_refused(2) <= 2
    assert script.witness.bound == (40, "refused with 40 in flight")
    price = script.witness._price
    assert price in (1, 2)
    assert script.step_refused(400) == 160 * price


def test_a_server_that_has_grown_is_doubled() -> None:
    """A step goes well: no bound is left, and it says why."""
    script = Script(most=1000)
    script.find(40)
    script.answer(11)
    assert script.level == pytest.approx(40 / 0.95)
    assert script.answer(10) == math.inf
    assert script.witness.bound.why == "no longer refused with 40 in flight"


def test_a_refused_step_that_cost_a_pause_is_not_repeated_soon() -> None:
    """A second of silence each: 28 seconds apart, however many are answered."""
    script = Script()
    script.find(40)
    script.answer(11)
    while script.level > 40:
        script.refuse(script.send(int(script.level)), 1.0)
    since_s = script.now_s
    while script.level <= 40:
        script.witness.answered(script.now_s, script.send(40), 0.1)
    assert 27.9 <= script.now_s - since_s <= 28.1


@pytest.mark.parametrize(("wait_s", "until_s"), [(7.0, 7.0), (0.5, 0.5), (None, 0.0)])
def test_a_wait_that_is_asked_for_is_kept(wait_s: float | None, until_s: float) -> None:
    """By all where it is long, or the refusal is no chance; a first cut needs little of its own."""
    script = Script()
    script.refuse(script.send(41), wait_s)
    assert script.witness.paused_until_s == (REFUSAL_S + 7.0 if wait_s == 7.0 else 0.0)
    script.find(40, wait_s)
    paused_s = script.witness.paused_until_s - script.now_s
    assert paused_s == pytest.approx(until_s, abs=0.1) or (wait_s is None and paused_s <= 0.5)


def test_a_number_that_fell_is_no_clock() -> None:
    """400 slots, then 100: nothing is taken until they are free, then some; that is one number."""
    script = Script(most=400)
    for held in (400, 379, 265):
        script.find(held)
    script.answer(20)
    script.find(100)
    assert script.witness.rate.per_s is None
    assert script.witness.bound.why == "refused with 100 in flight"


def test_what_no_number_explains_follows_the_clock() -> None:
    """Refused with ever fewer in flight, though some were taken in between: a rate is learnt, and
    its setting named.
    """
    script = Script()
    script.find(40)
    for held in (30, 20):
        assert script.witness.rate.per_s is None
        script.answer(5)
        script.find(held)
    assert script.witness.rate.per_s is not None
    assert "set --requests-per-min" in script.witness.bound.why


def test_a_clock_that_refuses_at_random_was_none() -> None:
    """Every tenth is refused whatever is sent: no rate explains that, and chance is known now."""
    script = Script()
    script.find(40)
    for held in (30, 20):
        script.answer(5)
        script.find(held)
    while script.witness.rate.per_s is not None:
        script.answer(9)
        script.refuse(script.send(5))
        assert script.now_s < 60
    assert script.witness.bound == (math.inf, "refusals come by chance, whatever is sent")
    assert script.witness._chance.share == pytest.approx(0.1, rel=0.3)
