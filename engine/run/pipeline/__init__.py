"""The run itself: what is asked next, the calls, their answers, the decisions, and the end.

    requests ──▶ calls ──▶ store ──▶ call, call, call … ──▶ answers ──▶ decisions ──▶ store
    (plan order)          (sent)    (any order)            (answered)  (plan order)  (decided)

pipeline       the tasks of one run; all of them start there
 ├─ state      what its parts share, and what follows from it: how much is wanted, what is over
 ├─ stopping   why nothing more is sent, and how what is under way comes home
 ├─ requests   which prompts go out next
 ├─ calls      a slot, the record, the call
 ├─ answers    kept, counted, handed on to be decided
 ├─ decisions  kept, counted; a process that dies is replaced
 ├─ lane       the same for requests that go in batches
 └─ showing    what the person sees of it

Tasks that wait, their groups and time are anyio's. A call and a commit are asyncio's: there are
many of them, and what calls back need not be woken.
"""

from engine.run.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
