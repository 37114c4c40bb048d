"""Two hosts: network, name and mount namespaces of their own, joined by a cable of the kernel's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.trainer.launch import curve, finish, start
from trainer.checkpoint import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Host:
    """One of the two; alive as long as its process."""

    number: int
    process: subprocess.Popen[bytes]

    def command(self, *words: str) -> list[str]:
        """``words``, to be run on this host."""
        return ["nsenter", "-t", str(self.process.pid), "-n", "-m", "-u", "--", *words]


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other as 10.77.0.1 and 10.77.0.2, and nothing else."""
    tools = all(shutil.which(name) for name in ("unshare", "nsenter", "ip"))
    if os.geteuid() or not tools:
        pytest.skip("two hosts need root, util-linux and iproute2")
    alone = ["unshare", "-nmu", "--propagation", "private", "sleep", "600"]
    if subprocess.run([*alone[:-2], "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine gives no namespaces")
    pair = [Host(number, subprocess.Popen(alone)) for number in (0, 1)]
    try:
        for host in pair:
            # The namespaces are there as soon as the process is what unshare starts.
            comm = Path(f"/proc/{host.process.pid}/comm")
            while comm.read_text().strip() != "sleep":
                pass
        first, second = pair
        near = ["name", "cable", "netns", str(first.process.pid)]
        far = ["name", "cable", "netns", str(second.process.pid)]
        _run("ip", "link", "add", *near, "type", "veth", "peer", *far)
        for host in pair:
            _run(*host.command("hostname", f"host{host.number}"))
            _run(*host.command("ip", "address", "add", f"10.77.0.{host.number + 1}/24",
                               "dev", "cable"))  # fmt: skip
            for link in ("lo", "cable"):
                _run(*host.command("ip", "link", "set", link, "up"))
        yield first, second
    finally:
        for host in pair:
            host.process.kill()
            host.process.wait()


def train(hosts: tuple[Host, Host], arguments: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of a process on each host."""
    running = []
    for host in hosts:
        environment = os.environ | {
            "RANK": str(host.number),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29511",
            "GLOO_SOCKET_IFNAME": "cable",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),  # nsenter leaves the working folder
        }
        command = host.command(sys.executable, "-m", "trainer", *arguments)
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    ends = []
    for process in running:
        output, _ = process.communicate(timeout=100)
        ends.append((process.returncode, output))
    return ends


@pytest.fixture
def arguments(llama: Path, records_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(llama), "--data_path", str(records_file)),
        *("--dataset_cache_dir", str(tmp_path / "cache"), "--max_steps", "4"),
        *("--global_batch_size", "4", "--per_device_train_batch_size", "1"),
        *("--model_max_length", "200", "--learning_rate", "3e-3", "--save_steps", "2"),
        *("--timeout_s", "60", "--planned_processes", "2", "--output_dir"),
    ]


def test_two_hosts_train_as_one_and_one_goes_on(
    hosts: tuple[Host, Host], arguments: list[str], tmp_path: Path
) -> None:
    """With a shared folder: losses bitwise those of one process, the manifest lists the shards of
    both, and a host alone goes on from it.
    """
    ends = train(hosts, [*arguments, str(tmp_path / "two")])
    assert [code for code, _ in ends] == [0, 0], ends
    (done,) = finish(start([*arguments, str(tmp_path / "one")], tmp_path / "logs"))
    assert done.exit_code == 0, done.output
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    manifest = read_manifest(tmp_path / "two" / "checkpoint-2")
    assert len(manifest.files) == manifest.world_size == 2
    assert not list((tmp_path / "two").glob(".shared-*"))
    again = [*arguments, str(tmp_path / "on"), "--resume", f"{tmp_path}/two/checkpoint-2"]
    (done,) = finish(start(again, tmp_path / "logs"))
    assert done.exit_code == 0, done.output


def test_an_output_folder_that_is_not_shared_is_refused_at_the_start(
    hosts: tuple[Host, Host], arguments: list[str], tmp_path: Path
) -> None:
    """78 on both before a model is loaded, and the host that does not see the folder is named."""
    out = tmp_path / "out"
    out.mkdir()
    _run(*hosts[1].command("mount", "-t", "tmpfs", "none", str(out)))
    ends = train(hosts, [*arguments, str(out)])
    assert [code for code, _ in ends] == [78, 78], ends
    assert "is not shared by all hosts: host1 does not see what rank 0 writes" in ends[1][1]
    assert "parameters learned" not in ends[0][1]
    assert not list(out.glob("checkpoint-*"))
