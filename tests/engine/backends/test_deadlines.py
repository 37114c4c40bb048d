"""One timer for many calls: each times out when its own time has come."""

from __future__ import annotations

import asyncio

import pytest

from engine.backends.openai.deadlines import Deadlines

pytestmark = pytest.mark.anyio


async def ended_after(deadlines: Deadlines, *ends: float, over_s: float = 5.0) -> float:
    """Seconds until a call times out whose limit is set to each of ``ends`` in turn, 10 ms apart;
    ``over_s`` where it ends by itself."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    call = asyncio.timeout(None)
    try:
        async with call:
            for end in ends:
                deadlines.set(call, began + end)
                await asyncio.sleep(0.01)
            await asyncio.sleep(over_s - (loop.time() - began))
    except TimeoutError:
        return loop.time() - began
    finally:
        deadlines.drop(call)
    return over_s


async def test_each_call_has_its_own_time() -> None:
    deadlines = Deadlines()
    took = await asyncio.gather(
        ended_after(deadlines, 0.4),
        ended_after(deadlines, 0.1),  # earlier than what the timer was set for
        ended_after(deadlines, 0.1, 0.3),  # put off, as by a stream's event
        ended_after(deadlines, 5.0, 0.2),  # brought forward
        ended_after(deadlines, 0.6, over_s=0.05),  # over before
    )
    for seconds, least in zip(took, (0.4, 0.1, 0.3, 0.2, 0.05), strict=True):
        assert least <= seconds < 5.0
    assert took[1] < took[3] < took[2] < took[0]
    assert len(deadlines) == 0


async def test_all_can_be_ended_at_once_and_new_ones_begin() -> None:
    deadlines = Deadlines()
    calls = [asyncio.create_task(ended_after(deadlines, 5.0)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert len(deadlines) == 3
    deadlines.expire()
    assert all(seconds < 5.0 for seconds in await asyncio.gather(*calls))
    assert await ended_after(deadlines, 0.1) < 5.0
