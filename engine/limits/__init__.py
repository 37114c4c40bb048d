"""What may be in flight where.

pool                  hands out slots (``Lease``) over all endpoints, hears what came of them
 └─ endpoint          what one endpoint has room for; its breaker, its pauses
     ├─ controller    finds its limit from what its answers tell
     │   └─ chance    tells refusals by chance from those of a limit
     └─ quota         requests and tokens a minute, money
"""

from engine.limits.pool import EndpointLimits, Lease, LimitSettings, Pool

__all__ = ["EndpointLimits", "Lease", "LimitSettings", "Pool"]
