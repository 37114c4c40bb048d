"""A Ray cluster of several nodes on this machine, each at an address of its own on the loopback.

A process of its own, under an interpreter that has Ray. It reads a command a line and answers each
with a line of JSON: ``add IP CPUS``, ``kill IP`` (every process of the node at once, as when its
machine loses power), ``end``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster


def children() -> dict[int, list[int]]:
    """The child processes of each process."""
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            found.setdefault(int(parent), []).append(int(path.parent.name))
    return found


def kill_all(node: Any) -> int:
    """Kill every process of a node; how many there were."""
    of, todo, found = children(), [], []
    for infos in node.all_processes.values():
        todo += [info.process.pid for info in infos]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += of.get(pid, [])
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def main() -> None:
    cluster = Cluster()
    nodes: dict[str, Any] = {}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    for line in sys.stdin:
        match line.split():
            case ["add", ip, cpus]:
                nodes[ip] = cluster.add_node(
                    node_ip_address=ip, num_cpus=int(cpus), num_gpus=0, include_dashboard=False
                )
                said: Any = cluster.address
            case ["kill", ip]:
                said = kill_all(nodes.pop(ip))
            case _:
                break
        print(json.dumps(said), file=out, flush=True)
    for node in nodes.values():
        kill_all(node)


if __name__ == "__main__":
    main()
