"""What may be in flight where.

pool                  hands out slots (``Lease``) over all endpoints, hears what came of them
 ├─ candidates        which endpoint is next, of four as of hundreds
 ├─ watch             looks at servers while they work
 ├─ doubts            whether refusals that blame the settings are right about them
 └─ endpoint          what one endpoint has room for; its breaker, its pauses
     ├─ history       why a limit is where it is, change by change
     ├─ controller    what is asked of a limit; one that is given
     ├─ finder        one that is found: the least that three witnesses allow
     │   ├─ refusals  the number at which the server refused
     │   │   ├─ chance  tells refusals by chance from those of a limit
     │   │   └─ rate    where refusals follow the clock: so many a second
     │   ├─ goodput   the number beyond which there are no more tokens a second
     │   └─ gauges    the queue that the server shows
     └─ quota         requests and tokens a minute that are known, money
"""

from engine.limits.doubts import OF_THE_PROMPT
from engine.limits.history import News
from engine.limits.pool import EndpointLimits, Lease, LimitSettings, Pool

__all__ = ["OF_THE_PROMPT", "EndpointLimits", "Lease", "LimitSettings", "News", "Pool"]
