"""The child process that keeps servers on a Ray cluster: the other half of ``ray_fleet``.

Its input is one message, the order; it ends when its input does: then the servers are stopped, in
order. What happens is a message each (``engine.processes.frames``, JSON alone):

    joined  replicas, notes    the cluster is there, and so many servers are wanted
    up      replica, url       a server answers
    down    replica            its worker or its node has died; Ray starts it again
    dead    replica, error, message    it will not come again
    failed  error, message     nothing can be done
    seen    cluster            what was asked for with ``look``

One actor is one server. Two calls wait for it, and nothing is asked again and again: ``up`` returns
when it answers, and ``gone`` when it has died for good. That the second fails means that the worker
has died; the first is then called once more, and Ray lets it wait for the next worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

from engine.backends.vllm.ray_replica import Replica
from engine.processes.frames import frame, keep_pipes, read_frame
from engine.text import counted, shorten

Tell = Callable[..., None]
STOP_S = 20.0
"""How long servers may take to end in order. Ray and the tethers end what is left."""
MOST_SAID = 500
"""Characters of what went wrong."""


class RayMissingError(Exception):
    """Ray is not installed, or there is no cluster."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def join(address: str) -> None:
    """Join the cluster. Never one of our own: an address is always given."""
    try:
        import ray
    except ImportError as error:
        raise RayMissingError(
            "ConfigError", "ray is not installed here: pip install 'woolmill[ray]'"
        ) from error
    if os.environ.get("RAY_ADDRESS") == "local":
        del os.environ["RAY_ADDRESS"]  # with it, auto would start a cluster
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # whatever Ray raises, there is no cluster to be used
        said = shorten(str(error), MOST_SAID)
        raise RayMissingError(
            "UnavailableError",
            f"no Ray cluster can be joined at {address} ({said}); start one with ray start, and "
            "make this machine one of its nodes",
        ) from error


def seen() -> dict[str, Any]:
    """The nodes that live, and what they have in all."""
    import ray

    total = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return {
        "nodes": len(nodes),
        "CPU": int(total.get("CPU", 0)),
        "GPU": int(total.get("GPU", 0)),
        "ray": ray.__version__,
    }


def wanted(order: Mapping[str, Any], cluster: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """Servers, the GPUs of each, and what the person should know of them."""
    gpus, each = cluster["GPU"], order["gpus"]
    count = order["replicas"] or max(1, gpus // each)
    notes = [
        f"{counted(count, 'server')} on {counted(cluster['nodes'], 'node')} with"
        f" {counted(gpus, 'GPU')}; the key is this run's own and travels unencrypted"
    ]
    if not gpus:
        return count, 0, notes
    if count * each > gpus:
        notes.append(
            f"{counted(count, 'server')} of {counted(each, 'GPU')} need {count * each}, and the "
            f"cluster has {gpus}: the others start when there are more"
        )
    return count, each, notes


async def drive(order: Mapping[str, Any], tell: Tell, ends: asyncio.Event) -> None:
    """Keep the servers until ``ends``."""
    import ray

    count, gpus, notes = wanted(order, seen())
    tell("joined", replicas=count, notes=notes)
    kind = ray.remote(Replica).options(
        num_gpus=gpus,
        num_cpus=1,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
    )
    actors = [kind.remote(dict(order["server"])) for _ in range(count)]
    following = [
        asyncio.create_task(follow(actor, number, tell)) for number, actor in enumerate(actors)
    ]
    await ends.wait()
    for task in following:
        task.cancel()
    stopping = [asyncio.ensure_future(stop(actor)) for actor in actors]
    await asyncio.wait(stopping, timeout=STOP_S)


async def follow(actor: Any, number: int, tell: Tell) -> None:
    """One server, for as long as there may be one."""
    import ray
    from ray.exceptions import ActorDiedError, RayError

    while True:
        try:
            said = await actor.up.remote()
        except ActorDiedError as error:  # it cannot be made, or the cluster is coming to its end
            message = f"Ray cannot start a server: {shorten(str(error), MOST_SAID)}"
            tell("dead", replica=number, error="UnavailableError", message=message)
            return
        except RayError:  # out of reach for a while
            await asyncio.sleep(1.0)
            continue
        if "url" in said:
            tell("up", replica=number, url=said["url"])
            try:
                said = await actor.gone.options(max_task_retries=0).remote()
            except RayError:
                tell("down", replica=number)
                continue
        message = shorten(said["message"], MOST_SAID)
        tell("dead", replica=number, error=said["error"], message=message)
        ray.kill(actor)
        return


async def stop(actor: Any) -> None:
    """End a server in order, then its worker."""
    import ray
    from ray.exceptions import RayError

    try:
        await actor.stop.options(max_task_retries=0).remote()
    except RayError:
        pass  # there is none
    ray.kill(actor)


def run(order: Mapping[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    """Do what is ordered, until ``source`` ends; what happens goes to ``out``."""
    writing = threading.Lock()

    def tell(event: str, **more: Any) -> None:
        with writing:
            out.writelines(frame(json.dumps({"event": event, **more}).encode()))
            out.flush()

    try:
        join(order["address"])
    except RayMissingError as error:
        tell("failed", error=error.kind, message=str(error))
        return
    if order.get("look"):
        tell("seen", cluster=seen())
        return
    asyncio.run(_until_it_ends(source, order, tell))


async def _until_it_ends(source: BinaryIO, order: Mapping[str, Any], tell: Tell) -> None:
    loop, ends = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        while source.read(1):
            pass
        loop.call_soon_threadsafe(ends.set)

    threading.Thread(target=wait, daemon=True).start()
    await drive(order, tell, ends)


def main() -> NoReturn:
    """Take the order and follow it."""
    source, out = keep_pipes()
    order = read_frame(source)
    if order is not None:  # else whoever started this is gone already
        run(json.loads(order.head), source, out)
    sys.exit(0)


if __name__ == "__main__":
    main()
