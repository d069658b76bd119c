"""One job over two hosts (tests/hosts.py), DeepSpeed's launcher on each: answers, network, and a host that goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts import Host, hosts, need_hosts
from launching import Running
from scripts import one_host, start, tokens

pytestmark = [pytest.mark.ranks, pytest.mark.long, need_hosts]
PORT = 29511


def hostfile(directory: Path, *lines: str) -> str:
    file = directory / "hostfile"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def as_debian_names_them(*all_hosts: Host) -> None:
    """A host's own name is a loopback address to itself, and a bridge of containers is up."""
    for host in all_hosts:
        others = [f"{h.address} {h.name}" for h in all_hosts if h is not host]
        host.mount_file("/etc/hosts", "\n".join(["127.0.0.1 localhost", f"127.0.1.1 {host.name}", *others]) + "\n")


def add_bridge(host: Host) -> None:
    """What Docker leaves on a host that has no container running."""
    host.must("ip", "link", "add", "docker0", "type", "bridge")
    host.must("ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
    host.must("ip", "link", "set", "docker0", "up")


def start_both(a: Host, b: Host, file: str, tp_size: int, *overrides: str, **env: str) -> list[Running]:
    env = {"HOSTFILE": file, "MASTER_ADDR": a.address, "MASTER_PORT": str(PORT), **env}
    return [start("two_hosts.sh", tp_size, host=host, overrides=overrides, NODE_RANK=str(i), **env)
            for i, host in enumerate((a, b))]


def wait_until_generating(job: Running, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while "generating" not in job.output():
        assert time.monotonic() < deadline and job.process.poll() is None, job.output()[-4000:]
        time.sleep(0.1)


def test_four_ranks_on_two_hosts(tmp_path):
    """Odd names, a bridge of containers, and nothing set but what the script is given."""
    with hosts("hA", "hB") as (a, b):
        as_debian_names_them(a, b)
        add_bridge(a)
        add_bridge(b)
        jobs = start_both(a, b, hostfile(tmp_path, "hA slots=2", "hB slots=2"), 4)
        wait_until_generating(jobs[0])
        listening = {host.name: host.listening() for host in (a, b)}
        outcomes = [job.finish(120) for job in jobs]
        assert not a.leftovers() + b.leftovers()
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].err[-3000:] + outcomes[1].err[-3000:]
    assert tokens(outcomes[0].out) == one_host() and not outcomes[1].out.count("{\"id\"")
    assert "network: interface eth0, which leads to MASTER_ADDR 10.77.0.1" in outcomes[0].err
    assert "all-reduce: torch group" in outcomes[0].err and "LOCAL_SIZE 2, world 4" in outcomes[0].err
    for host in (a, b):  # the rendezvous, and torch's connections between ranks on the one network that they share
        stray = {(address, port) for address, port in listening[host.name] if address != host.address}
        assert {port for _, port in stray} <= ({PORT} if host is a else set()), listening


def test_master_addr_that_is_loopback_on_its_own_host(tmp_path):
    """The name of the first host, which to itself is 127.0.1.1: its one other interface is meant; of two, neither."""
    with hosts("hA", "hB") as (a, b):
        as_debian_names_them(a, b)
        file = hostfile(tmp_path, "hA slots=1", "hB slots=1")
        outcomes = [job.finish() for job in start_both(a, b, file, 2, MASTER_ADDR="hA")]
        assert [o.code for o in outcomes] == [0, 0], outcomes[0].err[-3000:] + outcomes[1].err[-3000:]
        assert tokens(outcomes[0].out) == one_host()
        add_bridge(a)
        job = start("two_hosts.sh", 2, host=a, NODE_RANK="0", HOSTFILE=file, MASTER_ADDR="hA")
        outcome = job.finish(120)
        assert not a.leftovers() + b.leftovers()
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "MASTER_ADDR hA is loopback on host hA" in outcome.err and "docker0, eth0" in outcome.err


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_host_that_goes_is_named_by_the_other(tmp_path, how):
    """Cable cut: both sides end and name the other. All processes killed: the other side does."""
    with hosts("hA", "hB") as (a, b):
        jobs = start_both(a, b, hostfile(tmp_path, "hA slots=1", "hB slots=1"), 2,
                          "generation={max_new_tokens: 30000, min_new_tokens: 30000}", "tensor_parallel.heartbeat_s=8")
        wait_until_generating(jobs[0])
        time.sleep(2)
        getattr(b, how)()
        ours, theirs = jobs[0].finish(30), jobs[1].finish(30)
        assert not a.leftovers() + b.leftovers()
    assert ours.code != 0 and theirs.code != 0
    assert "hB" in ours.err, ours.err[-3000:]
    assert how == "kill" or "hA" in theirs.err, theirs.err[-3000:]
