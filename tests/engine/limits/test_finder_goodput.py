"""What tokens a second say of the limit: a server is a function from level to rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.limits.finder.goodput import Goodput, Phase


class Server:
    """Answers ``goodput`` at each level with 100 tokens after as long as its rate says."""

    def __init__(self, rate: Callable[[float], float]) -> None:
        self.rate = rate
        self.goodput = Goodput(4.0)
        self.now_s = 0.0
        self.levels: list[float] = [4.0]

    def serve(self, until_s: float) -> list[float]:
        """The levels until then, each that is new."""
        while self.now_s < until_s:
            work_s = 100 / self.rate(self.goodput.bound.most)
            self.now_s += work_s
            self.goodput.look(self.now_s, 100)
            self.goodput.answered(self.now_s, 100, work_s)
            if self.goodput.bound.most != self.levels[-1]:
                self.levels.append(self.goodput.bound.most)
        return self.levels


KNEES = {
    "a knee": (lambda level: 100 * min(level, 64), 50, 100),
    "a knee that bends slowly": (lambda level: 6400 * level / (level + 64), 128, 2000),
    "worse beyond": (lambda level: 100 * level if level <= 100 else 5000.0, 75, 100),
    "one is enough": (lambda level: 400.0, 1, 8),
}


@pytest.mark.parametrize("name", KNEES)
def test_the_knee_is_found(name: str) -> None:
    """It doubles, goes back, and stays near the least level that gives the most."""
    rate, least, most = KNEES[name]
    server = Server(rate)
    assert server.serve(600.0)[:2] == [4.0, 8.0]
    assert least <= server.goodput.bound.most <= most


@pytest.mark.parametrize(("share", "kept"), [(0.9, 1.0), (0.65, 1.0), (0.5, 0.5), (0.1, 0.45)])
def test_a_fall_cuts_before_what_is_sent_now_comes_back(share: float, kept: float) -> None:
    """Answers of requests that were sent before come more slowly: two short windows decide."""
    server = Server(lambda level: 100 * min(level, 64))
    server.serve(100.0)
    goodput = server.goodput
    goodput.phase, level = Phase.HOLDING, goodput.bound.most
    goodput.look_anew(server.now_s)
    for answer in range(1, 200):
        goodput.look(server.now_s + answer / 64 / share, 100)
        if goodput.bound.most != level:
            break
    assert goodput.bound.most == pytest.approx(kept * level, rel=0.05)


def test_a_server_that_became_faster_is_followed() -> None:
    server = Server(lambda level: 100 * min(level, 32))
    server.serve(100.0)
    server.rate = lambda level: 100 * min(level, 256)
    server.serve(200.0)
    assert server.goodput.bound.most >= 200


def test_what_did_worse_is_come_halfway_to_and_not_more_for_a_minute() -> None:
    """Beyond 100 the server thrashes: each trial of a crowded level costs less than the one before,
    and within a minute none is made twice.
    """
    server = Server(lambda level: 100 * level if level <= 100 else 5000.0)
    server.serve(60.0)
    beyond = [level for level in server.levels if level > 100]
    assert beyond == sorted(beyond, reverse=True)
    assert len(beyond) == len(set(beyond)) <= 5


def test_levels_are_whole_numbers_and_never_nothing() -> None:
    server = Server(lambda level: 400.0)
    assert all(level == int(level) >= 1 for level in server.serve(600.0))
