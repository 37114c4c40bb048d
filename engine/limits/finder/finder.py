"""How many requests one endpoint should have in flight, found from what it does.

Three signals, one limit:

* **Refusals** (429): a hosted API's way. Those by chance are told from a limit's (``chance``). The
  limit falls a little at the first of an episode and hard when cutting once was not enough;
  requests admitted before a cut cannot cut again. The limit climbs back to just under where it was
  refused, and takes a step beyond only as often as a small share of refusals allows, and the pauses
  that they cost; one that goes well leads to a wider one, that to doubling. A limit of a handful
  that is refused all the same was none. Where the refusals follow the clock rather than the number
  in flight (``clock``), the server counts requests a minute, and a ``pace`` is learnt.
* **Goodput**: a server that queues instead of refusing shows its knee in tokens per second. By
  Little's law every answer is a sample: with n in flight on average during its life, an answer of
  T tokens after L seconds means n·T/L tokens a second. So two levels are compared within about one
  latency, without counting answers per window.
* **Queue and preemptions**, where the server publishes them (vLLM's ``/metrics``): a queue that
  stays empty invites growth at once, one that grows is cut off at its length.

It starts by doubling, and never grows while the work at hand does not fill the present limit.
The price is two dozen numbers, at the top, that simulation chose (``benchmarks/bench_limits.py``).

Ideas from: TCP's slow start and CUBIC's plateau; Inspect AI's saturation gate and DataDesigner's
damping of bursts; Netflix's and Envoy's gradient limiters.
"""

from __future__ import annotations

import math

from engine.limits.controller import MAX_PAUSE_S, PAUSE_S, Ticket, concerns_all
from engine.limits.finder.chance import Chance
from engine.limits.finder.clock import Clock
from engine.limits.finder.pace import Pace
from engine.limits.history import History, Witness

__all__ = ["Adaptive"]

START = 4.0
SATURATED = 0.8
"""Share of the limit that must be in flight before its measure counts."""
WORTH, WORTH_OF_STEP = 0.03, 0.3
"""Gain in goodput that is worth a larger limit; of a small step, such a share of the step."""
CHANGED = 0.12
"""Change in goodput at the same limit that means another server."""
CLEAR = 0.15
"""Difference in goodput that needs fewer answers to be believed: a quarter after a step, half where
none was made."""
SEEN, FALLEN, LEAST_KEPT = 40, 0.6, 0.45
"""A fall of goodput: two windows, each as long as so many answers usually take, with less than this
share of the usual; and the least share of the limit that is kept then."""
PROBE_UP, PROBE_DOWN, RETREAT = 1.25, 0.9, 0.7
MAX_PATIENCE = 16
"""Rounds between two probes that led nowhere; starts at 1 and doubles."""
REMEMBER_S, UNKNOWN = 60.0, (1.0, 0.0)
"""How long a level that did worse is not tried again; none that did."""
LEAST_STEP = 0.04
"""Logarithm of the smallest step towards such a level."""
CUT_FIRST, CUT_AGAIN = 0.05, 0.3
"""The first cut of an episode and the next."""
HELD = 0.99
"""Share of the number at which the server refused that is held."""
STEP, WIDER = 1.02, 1.1
"""A step beyond that number, and the next if it goes well; that leads to doubling. A server has a
slot free before the answer is here, so a step of one may go well by chance."""
CALM = 10
"""Answers after which an episode is over, and requests in a row that are taken after a step."""
STUBBORN = 3
"""Episodes in a row after which refusals are taken to follow the clock, not the number."""
MOST_IN_VAIN, SAME = 3, 2
"""They do not after all: so many more than doublings of what was accepted meanwhile, for a pace is
known twice as well at each; or so many in a row at the same number in flight as the one before."""
FEW = 8
"""A handful. With more in flight, refusals while doubling are doubted: a few too many cost little
there, and a cut that was not needed costs much."""
STARVED, MOST_STARVED = 24, 0.3
"""A limit of a handful is doubted after so many ends, twice as many each time, if some, but no more
than such a share, were refusals below it: a limit that is one refuses none there."""
FIRST_CAUTION, SUCCESSES_PER_REFUSAL = 80, 160
"""What must have gone well before a refusal is risked again: little at first, then so much that
under one per cent are refused."""
PAUSES_APART, MOST_APART_S = 28.0, 300.0
"""The same in time: nothing is sent in a pause that a refusal asks for, so the next is risked only
after so many times its length. A pause of a second then costs 3.5 % of the goodput, and a server
that has grown is noticed within half a minute."""
PACE_ROOM = 1.1
"""The limit is at least so many times what the pace has in flight."""
TOLERATED = 0.03
"""Share of the running sequences that may be preempted in a second: chance alone does some."""
MAX_SAMPLES = 48
"""Answers that make a measure while doubling; a probe in steady state takes four times as many."""
MAX_CLIMB_S, MOST_CLIMBED_PER_S = 1.0, 500.0
"""A larger limit is reached within this time, so that a refusal on the way stops the climb; and not
faster than that if it can, for what is sent until the refusal is known may be refused too."""


DOUBLING = "doubling while that gives more tokens a second"
QUEUE_EMPTY = "nothing waits in the server's queue"
BY_CHANCE = "refusals come by chance, however many are in flight"
"""Reasons, as the history has them."""


class Adaptive:
    """The controller of ``--max-in-flight auto``; see the head of this file."""

    def __init__(self, *, start: float = START, ceiling: float = 4096) -> None:
        self.ceiling = ceiling
        self.in_flight = 0
        self.paused_until_s = 0.0
        self.latency_s = 1.0
        self.history = History(Witness.START, "the start of every run")
        self._target = min(start, ceiling)
        self._from = self._target  # the limit climbs from here to the target
        self._climb_s = 0.0
        self._climb_at_s = 0.0
        self._area = 0.0  # integral of in_flight over time
        self._area_at_s = 0.0
        # rounds: one measure of goodput at one limit
        self._phase = "start"  # doubling; or hold; or up, down, retreat: trying another limit
        self._base: tuple[float, float] | None = (
            None  # the limit to beat, and its tokens per second
        )
        # A limit that did worse and until when that counts; True: above the base, False: below it.
        self._worse = {True: UNKNOWN, False: UNKNOWN}
        self._patience = 1
        self._rounds = 0
        self._down_next = False
        self._odd = 0
        self._full_at_s: float | None = None
        self._count = 0
        self._tokens = 0.0
        self._work = 0.0
        self._seen_from_s, self._seen, self._seen_tokens, self._falls = 0.0, 0, 0.0, 0
        # refusals
        self._refused_at: float | None = None  # in flight when the server last said no
        self._held = 0.0  # the same, though that was in a step beyond what is known to be held
        self._episode_s: float | None = None
        self._sent_s: float | None = None  # the first that went out after it began
        self._streak = 0
        self._resuming = False
        self._refusals = 0
        self._patient_until_s = 0.0
        self._caution = FIRST_CAUTION
        self._successes = 0
        self._refusal_s = 0.0  # from a request to its refusal
        self._tried = self._beyond = 0  # sent in a step, in all and since the latest refusal
        self._tried_at_s = self._beyond_at_s = 0.0  # the first of them
        self._chance = Chance()
        self._clock = Clock(FEW)
        self._same = self._same_at = 0
        self._alone = 0  # refusals in a row with nothing else in flight
        self._starved = [0, 0]  # ends with next to nothing in flight, and refusals among them
        self._starved_enough = STARVED
        self._pace = Pace()
        self._all_successes = 0
        # gauges
        self._watched_until_s = 0.0
        self._growth = 0.1
        self._preemptions: float | None = None

    # What the pool asks

    def limit(self, now_s: float) -> float:
        if now_s >= self._climb_at_s + self._climb_s:
            return self._target
        share = max(now_s - self._climb_at_s, 0.0) / self._climb_s
        return self._from + (self._target - self._from) * share

    def has_room(self, now_s: float) -> bool:
        if now_s < self.paused_until_s:
            return False
        if self._resuming:  # not all at once after a pause: the first refusal stops the rest
            self._resuming = False
            self._from = min(float(max(self.in_flight, 1)), self._target)
            self._climb_at_s, self._climb_s = now_s, MAX_CLIMB_S
        if self.in_flight + 1 > self.limit(now_s):
            return False
        return self._pace.per_s is None or now_s >= self._pace.next_s

    def next_change_s(self, now_s: float) -> float | None:
        if now_s < self.paused_until_s:
            return self.paused_until_s
        if self.in_flight + 1 <= self.limit(now_s):
            return self._pace.next_s
        if now_s < self._climb_at_s + self._climb_s:
            step_s = self._climb_s / max(self._target - self._from, 1.0)
            return now_s + max(step_s, 0.01)
        return None

    # What the pool tells

    def admit(self, now_s: float) -> Ticket:
        self._count_area(now_s)
        self.in_flight += 1
        self._chance.doubted = self._phase == "start" and self.in_flight > FEW
        self._chance.sent()
        if self._full_at_s is None and self.in_flight >= SATURATED * int(self._target):
            self._full_at_s = now_s
        self._pace.sent(now_s)
        if self._sent_s is None:
            self._sent_s = now_s
        ticket = Ticket(now_s, self._area, self.in_flight)
        if self._is_beyond(ticket) and self.in_flight >= int(self._target):
            self._maybe_end_step(now_s)
        return ticket

    def fail(self, now_s: float) -> None:
        self._count_area(now_s)
        self.in_flight -= 1

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        self.fail(now_s)
        took_s = max(now_s - ticket.at_s, 1e-6)
        self.latency_s += 0.1 * (took_s - self.latency_s)
        self._all_successes += 1
        self._alone = 0
        self._clock.answered(ticket.in_flight)
        self._starve(now_s, ticket, refused=False)
        if self._episode_s is None or ticket.at_s > self._episode_s:
            self._successes += 1
            self._maybe_step(now_s)
        if self._chance.answered(self._target):
            self._start_anew(now_s, BY_CHANCE)
        if self._streak and self._successes > CALM:
            self._streak = 0
        mean_in_flight = (self._area - ticket.area) / took_s
        if self._refused_at is None and mean_in_flight < SATURATED * int(self._target):
            self._look_anew(now_s)  # it is the work that lacks
            return
        self._maybe_flee(now_s, tokens)
        if self._full_at_s is None or ticket.at_s < self._full_at_s:
            return
        self._count += 1
        self._tokens += max(tokens, 1)
        self._work += took_s / max(mean_in_flight, 1.0)
        self._maybe_end_round(now_s)

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        """One cut an episode, however many are refused in it."""
        self.fail(now_s)
        self._refusal_s = now_s - ticket.at_s
        self._pace.refused(ticket.at_s)
        # What went out in the very moment of a cut went before it; but not where no time passes.
        wave = self._episode_s is not None and ticket.at_s <= min(self._episode_s, now_s - 1e-6)
        if self._chance.refused(self._target, expected=self._is_beyond(ticket)):
            self._start_anew(now_s, BY_CHANCE)
        if self._starve(now_s, ticket, refused=True):
            return
        if wave:
            self._count_wave(now_s)
            return
        beyond = self._is_beyond(ticket)
        paced = self._pace.per_s is not None
        down = self._clock.counts_down(retry_after_s, self.latency_s)
        counts = self._clock.refused(ticket.in_flight) or paced
        # Proof though chance is known, and a handful again: neither chance nor a number.
        neither = self._chance.scattered and self.in_flight < FEW and not beyond
        clock = counts or down or neither
        self._chance.doubted &= not (paced or down)
        proof = 1 if counts else self._chance.proof(expected=beyond or down)
        self._beyond = 0
        if not proof:
            self._obey_alone(now_s, retry_after_s)
        elif self._all_successes == 0 and self._target > 1:
            # It may take more, but not at once: start with what it took.
            pause_s = PAUSE_S if retry_after_s is None else retry_after_s
            self.paused_until_s = max(self.paused_until_s, now_s + pause_s)
            self._episode_s = now_s
            self._set(
                now_s, max(self.in_flight, 1.0), Witness.REFUSALS,
                "the first requests were refused but for these",
            )  # fmt: skip
        else:
            self._refusals = proof + (self._refusals if self._streak else 0)
            self._cut(now_s, ticket, retry_after_s, beyond=beyond, clock=clock)

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        self._watched_until_s = now_s + 5.0
        before = preemptions if self._preemptions is None else self._preemptions
        self._preemptions = preemptions
        if self.in_flight > self._target * 1.02 or now_s < self._climb_at_s + self._climb_s:
            return  # on the way to another level
        full = self.in_flight >= SATURATED * int(self._target)
        if preemptions - before > TOLERATED * running and full:
            self._growth = 0.1
            self._worse[True] = (self._target, now_s + REMEMBER_S)
            why = "the server takes back room from running requests"
            self._settle(now_s, 0.9 * self._target, Witness.GAUGES, why)
        elif waiting > max(2.0, 0.1 * running):
            self._growth = 0.1
            kept = max(self.in_flight - waiting + 0.05 * running, running, 1.0)
            why = f"{waiting:.0f} requests wait in the server's queue"
            self._settle(now_s, min(self._target, kept), Witness.GAUGES, why)
        elif waiting == 0 and full and self._refused_at is None:  # refusals outweigh it
            if self._phase == "start":
                self._set(now_s, self._target * 2, Witness.GAUGES, QUEUE_EMPTY)
            elif self._worse[True] is UNKNOWN or now_s >= self._climb_at_s + self.latency_s:
                # Sequences fill the cache as they grow: too many show after about an answer.
                target = self._beside(now_s, 1 + self._growth)
                self._growth = min(2 * self._growth, 1.0) if target > self._target else 0.1
                self._settle(now_s, target, Witness.GAUGES, QUEUE_EMPTY)

    # Rounds: what the answers say

    def _maybe_end_round(self, now_s: float) -> None:
        most = MAX_SAMPLES if self._phase == "start" else 4 * MAX_SAMPLES
        wanted = min(max(self._target / 2, 3.0), most)
        rate = self._tokens / self._work
        if self._base is not None and abs(rate / self._base[1] - 1) > CLEAR:
            wanted = max(wanted / (2 if self._phase == "hold" else 4), 3.0)
        if self._count < wanted:
            return
        self._count, self._tokens, self._work = 0, 0.0, 0.0
        self._rounds += 1
        if self._refused_at is not None:
            self._climb_back(now_s)
        elif now_s < self._watched_until_s:
            # The gauges know better, and are looked at once a second: too seldom to double by.
            best = self._base[1] if self._base is not None else 0.0
            if self._phase == "start" and rate > (1 + WORTH) * best:
                self._base = (self._target, rate)
                self._set(now_s, self._target * 2, Witness.START, DOUBLING)
        elif self._base is None:
            self._base = (self._target, rate)
            if self._phase == "start":
                self._set(now_s, self._target * 2, Witness.START, DOUBLING)
        elif self._phase == "hold":
            self._hold(now_s, rate)
        else:
            self._judge(now_s, rate)

    def _hold(self, now_s: float, rate: float) -> None:
        assert self._base is not None
        level, usual = self._base
        if abs(rate / usual - 1) > CHANGED:
            self._odd += 1
            if self._odd >= 2:  # another server: look for its best from here
                self._odd, self._patience = 0, 1
                self._worse = {True: UNKNOWN, False: UNKNOWN}
                self._base = (self._target, rate)
                self._try(now_s, "start" if rate > usual else "retreat")
            return
        self._odd = 0
        self._base = (level, usual + 0.3 * (rate - usual))
        if self._rounds >= self._patience:
            self._try(now_s, "down" if self._down_next else "up")
            self._down_next = not self._down_next

    def _maybe_flee(self, now_s: float, tokens: int) -> None:
        """Goodput that has fallen far, seen before what is sent now comes back: the server has lost
        as much of its room, and what is too much slows down all.
        """
        steady = self._phase == "hold" and now_s >= self._watched_until_s
        if not steady or self._base is None or self._full_at_s is None:
            self._look_anew(now_s)
            return
        self._seen += 1
        self._seen_tokens += tokens
        seconds, usual = now_s - self._seen_from_s, self._base[1]
        if usual * seconds < SEEN * self._seen_tokens / self._seen:
            return
        share = self._seen_tokens / (usual * seconds)
        falls = self._falls + 1 if share < FALLEN else 0
        self._look_anew(now_s)
        self._falls = falls
        if falls < 2:
            return
        self._falls, self._patience, self._base = 0, 1, None
        target = max(self._target * max(share, LEAST_KEPT), 1.0)
        self._worse = {True: (target * PROBE_UP, now_s + REMEMBER_S), False: UNKNOWN}
        self._down_next = False
        why = f"tokens a second fell to {share:.0%} of what they were"
        self._settle(now_s, target, Witness.GOODPUT, why)

    def _look_anew(self, now_s: float) -> None:
        self._seen_from_s, self._seen, self._seen_tokens, self._falls = now_s, 0, 0.0, 0

    def _try(self, now_s: float, phase: str) -> None:
        """Go to another level, to compare it with the base."""
        factor = {"start": 2.0, "up": PROBE_UP, "down": PROBE_DOWN, "retreat": RETREAT}[phase]
        target = self._beside(now_s, factor)
        self._rounds = 0
        self._phase = phase if target != self._target else "hold"
        self._set(now_s, target, Witness.GOODPUT, "trying whether it gives more tokens a second")

    def _judge(self, now_s: float, rate: float) -> None:
        """A measure at another level is here: keep that level, or go back."""
        assert self._base is not None
        level, best = self._base
        gain, phase = rate / best - 1, self._phase
        downwards = phase in ("down", "retreat")
        # A retreat is judged leniently: its base was measured while things got worse.
        enough = {"down": -WORTH / 3, "retreat": -0.1}.get(
            phase, min(WORTH, WORTH_OF_STEP * (self._target / level - 1))
        )
        if gain >= enough:
            self._base, self._patience = (self._target, rate), 1
            self._down_next = downwards
            if phase == "down":
                self._phase, self._rounds = "hold", 0
            else:
                self._try(now_s, "start" if phase == "up" and gain > 0.1 else phase)
            return
        self._worse[not downwards] = (self._target, now_s + REMEMBER_S)
        why = f"{self._target:.0f} in flight gave no more tokens a second"
        self._settle(now_s, level, Witness.GOODPUT, why)
        if phase not in ("up", "down"):
            self._patience = 1
        elif self._beside(now_s, PROBE_DOWN if downwards else PROBE_UP) == level:
            self._patience = min(self._patience * 2, MAX_PATIENCE)  # nothing is left on this side

    def _beside(self, now_s: float, factor: float) -> float:
        """The next level to try: halfway to one that did worse, where that is remembered."""
        worse, until_s = self._worse[factor > 1]
        step, half = math.log(factor), math.log(worse / self._target) / 2
        if now_s < until_s and 0 < half / step < 1:
            step = half if abs(half) >= LEAST_STEP else 0.0
        return max(self._target * math.exp(step), 1.0)

    def _settle(self, now_s: float, target: float, who: Witness, why: str) -> None:
        self._phase, self._rounds = "hold", 0
        if target != self._target:
            self._set(now_s, target, who, why)

    # Refusals

    def _start_anew(self, now_s: float, why: str) -> None:
        """What was concluded from refusals does not hold, or not any more: double again."""
        self._refused_at = None
        self._pace.forget(now_s, self._all_successes + self.in_flight)
        self._phase, self._base = "start", None
        self._set(now_s, self._target * 2, Witness.REFUSALS, why)

    def _count_wave(self, now_s: float) -> None:
        """One more of the wave that ended in a cut; it was counted among those held."""
        self._refusals += 1
        if self._refused_at is None:
            taken = max(min(self._target, self.in_flight), 1.0)
            self._set(now_s, taken, Witness.REFUSALS, self._refusal)
        elif self._pace.per_s is None:
            self._held = max(self._held - 1, 1.0)
            self._refused_at = min(self._refused_at, self._held)
            if self._target > self._refused_at:
                self._set(now_s, self._known, Witness.REFUSALS, self._refusal)

    def _cut(
        self,
        now_s: float,
        ticket: Ticket,
        retry_after_s: float | None,
        *,
        beyond: bool,
        clock: bool,
    ) -> None:
        """The limit has refused ``ticket``: an episode begins."""
        if retry_after_s is not None:
            self.paused_until_s = max(self.paused_until_s, now_s + retry_after_s)
            self._patient_until_s = now_s + min(PAUSES_APART * retry_after_s, MOST_APART_S)
        held = self._held = float(max(self.in_flight, 1))
        if self._refused_at is not None and FEW < ticket.in_flight < 0.97 * self._refused_at:
            clock |= self._streak >= STUBBORN  # with fewer in flight than had just been accepted
        self._same = self._same + 1 if ticket.in_flight == self._same_at else 0
        self._same_at = ticket.in_flight
        if clock and self._same >= SAME and ticket.in_flight > 2 * FEW:  # the number after all
            self._pace.forget(now_s, self._all_successes + self.in_flight)
            self._refused_at, self._streak, clock, beyond = held, 0, False, True
        if clock:
            accepted = self._all_successes + self.in_flight
            self._pace.learn(now_s, accepted, self.latency_s, retry_after_s)
            held = self._paced
            if self._pace.vain > MOST_IN_VAIN + math.log2(1 + self._pace.vain_ends):
                self._chance.learn(self._pace.vain, self._pace.vain_ends)
                self._start_anew(now_s, BY_CHANCE)
                return
            if self._pace.known < SUCCESSES_PER_REFUSAL:
                self._chance.look_anew()  # measuring costs refusals, and they prove no chance
            self._set(now_s, held, Witness.REFUSALS, self._rate)
        elif beyond:
            assert self._refused_at is not None
            at = self._refused_at
            grown = ticket.in_flight > max((1 + WIDER) / 2 * at, at + 1)
            self._refused_at = held = min(held, at * STEP if grown else at)
            self._set(now_s, self._known, Witness.REFUSALS, self._refusal)
        else:
            # A cut after which some have been taken was nearly enough.
            taken = self._sent_s is not None and now_s > self._sent_s + 3 * self._refusal_s
            cut = CUT_AGAIN if self._streak > taken else CUT_FIRST
            target = max(_less(min(self.limit(now_s), held), cut), 1.0)
            self._set(now_s, target, Witness.REFUSALS, f"refused with {held:.0f} in flight")
        if self._streak and retry_after_s is None and not clock:  # a pace holds back by itself
            pause_s = min(PAUSE_S * 2.0 ** (self._streak - 1), MAX_PAUSE_S)
            self.paused_until_s = max(self.paused_until_s, now_s + pause_s)
        self._resuming = now_s < self.paused_until_s and not beyond
        self._episode_s, self._refused_at, self._successes = now_s, held, 0
        self._sent_s = None
        self._streak = min(self._streak + (not beyond), 16)
        self._clock.look_anew()
        self._phase, self._base = "hold", None

    def _obey_alone(self, now_s: float, retry_after_s: float | None) -> None:
        """A refusal that may be chance."""
        if not concerns_all(self.in_flight, retry_after_s):
            return
        pause_s = min(PAUSE_S * 2.0**self._alone, MAX_PAUSE_S)
        pause_s = pause_s if retry_after_s is None else retry_after_s
        self.paused_until_s = max(self.paused_until_s, now_s + pause_s)
        self._alone += 1

    def _starve(self, now_s: float, ticket: Ticket, *, refused: bool) -> bool:
        """Count an end; True: cutting has led to next to nothing, and no fewer are refused there,
        so they were refused by chance.
        """
        few = self._target <= FEW and self._pace.per_s is None
        if self._refused_at is None or not few or ticket.in_flight > self._refused_at:
            return False
        self._starved[0] += 1
        self._starved[1] += refused
        ends, refusals = self._starved
        if ends < self._starved_enough or not refusals:
            return False
        self._starved = [0, 0]
        if refusals > MOST_STARVED * ends:
            return False
        self._starved_enough *= 2
        self._chance.learn(refusals, ends)
        self._start_anew(now_s, BY_CHANCE)
        return True

    @property
    def _paced(self) -> float:
        """More than the pace has in flight."""
        return PACE_ROOM * (self._pace.per_s or 0.0) * self.latency_s + 1

    @property
    def _known(self) -> float:
        """Just under where the server last refused: what is held."""
        assert self._refused_at is not None
        return max(math.ceil(HELD * self._refused_at), 1.0)

    @property
    def _refusal(self) -> str:
        return f"refused with {self._refused_at or self._target:.0f} in flight"

    @property
    def _rate(self) -> str:
        per_min = 60 * (self._pace.per_s or 0.0)
        return (
            f"the server takes about {per_min:,.0f} requests a minute and does not say so; "
            "set --requests-per-min"
        )

    def _is_beyond(self, ticket: Ticket) -> bool:
        """Whether it went out in a step beyond where the server last refused."""
        if self._refused_at is None or self._pace.per_s is not None:
            return False
        return min(self._target, ticket.in_flight) > self._refused_at

    def _climb_back(self, now_s: float) -> None:
        """After an episode: up to just under where it was refused."""
        if not self._streak and self._target < self._known:
            target = min(self._target * 1.05 + 0.25, self._known)
            self._set(now_s, target, Witness.REFUSALS, f"climbing back: {self._refusal}")

    def _maybe_step(self, now_s: float) -> None:
        """Try a step beyond where it was refused, as soon as that can be afforded."""
        if self._pace.maybe_rise(now_s, self._all_successes + self.in_flight):
            self._refused_at = max(self._refused_at or 0.0, self._paced)
            self._set(
                now_s, max(self._target, self._refused_at), Witness.REFUSALS, self._rate
            )  # fmt: skip
        if self._refused_at is None or self._streak or self._target < self._known:
            return
        wanted = self._caution * (self._refusals if self._target >= START else 1)
        if (
            self._pace.per_s is not None
            or self._successes < wanted
            or now_s < self._patient_until_s
        ):
            return
        if self._target <= self._refused_at:
            self._caution = min(2 * self._caution, SUCCESSES_PER_REFUSAL)
            self._step(now_s, STEP)
        self._successes = 0

    def _step(self, now_s: float, factor: float) -> None:
        assert self._refused_at is not None
        self._beyond = self._tried = 0
        climb_s = 3 * self._refusal_s if factor == WIDER else None
        target = max(self._refused_at * factor, self._refused_at + 1)
        why = f"trying a little more: {self._refusal}"
        self._set(now_s, target, Witness.REFUSALS, why, climb_s)

    def _maybe_end_step(self, now_s: float) -> None:
        """One more is sent beyond: double if refusals would be back by now, and go back if there
        have been some all the time.
        """
        if self._tried == 0:
            self._tried_at_s = now_s
        if self._beyond == 0:
            self._beyond_at_s = now_s
        self._tried += 1
        self._beyond += 1
        if self._beyond > CALM and now_s > self._beyond_at_s + 3 * self._refusal_s:
            assert self._refused_at is not None
            if self._target < WIDER * self._refused_at:
                self._step(now_s, WIDER)
            else:
                self._caution = FIRST_CAUTION
                self._start_anew(now_s, f"no longer {self._refusal}")
        elif self._tried > 3 * CALM and now_s > self._tried_at_s + 4 * self._refusal_s:
            self._set(now_s, self._known, Witness.REFUSALS, self._refusal)

    def _set(
        self, now_s: float, target: float, who: Witness, why: str, climb_s: float | None = None
    ) -> None:
        """Up by a climb of half a latency or ``climb_s``, down at once; measuring begins anew."""
        target = min(target, self.ceiling)
        self.history.note(self._target, target, who, why)
        self._from = min(self.limit(now_s), target)
        self._climb_at_s = now_s
        climb_s = self.latency_s / 2 if climb_s is None else climb_s
        climb_s = min(max(climb_s, (target - self._from) / MOST_CLIMBED_PER_S), MAX_CLIMB_S)
        self._climb_s = climb_s if target > self._from else 0.0
        self._target = target
        self._full_at_s = now_s if self.in_flight >= int(target) else None
        self._count, self._tokens, self._work = 0, 0.0, 0.0

    def _count_area(self, now_s: float) -> None:
        self._area += self.in_flight * (now_s - self._area_at_s)
        self._area_at_s = now_s


def _less(level: float, share: float) -> float:
    """``share`` less, but nothing off a handful: one of four in flight is not five per cent."""
    return level - max(share * level - 0.5, 0.0)
