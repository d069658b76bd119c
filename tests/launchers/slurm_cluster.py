"""A real Slurm over the hosts of tests/hosts.py: munged and slurmd on each, slurmctld on the first."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence

import pytest
from hosts import Host

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo")
PRIVATE = ("/run", "/etc/munge", "/etc/slurm", "/var/lib/munge", "/var/log/munge", "/var/spool")
CONFIG = """\
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
StateSaveLocation=/var/spool/state
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/spool/slurmctld.log
SlurmdLogFile=/var/spool/slurmd.log
KillWait=3
NodeName={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""

need_slurm = pytest.mark.skipif(
    not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in TOOLS),
    reason="SLURM IS NOT TESTED: apt-get install slurm-wlm munge")


def start_slurm(hosts: Sequence[Host], timeout_s: float = 60) -> None:
    """Returns once every host is a node that waits for jobs. It ends with the hosts."""
    config = CONFIG.format(first=hosts[0].name, nodes=",".join(h.name for h in hosts), cpus=os.cpu_count())
    for host in hosts:
        for path in PRIVATE:
            host.mount_empty(path)
        for path in ("/run/munge", "/var/spool/state", "/var/spool/slurmd"):
            host.path(path).mkdir()
        host.path("/etc/slurm/slurm.conf").write_text(config)
        host.path("/etc/munge/munge.key").write_bytes(b"key of a cluster that lives for a test" * 4)
        host.must("chmod", "600", "/etc/munge/munge.key")
        host.must("chmod", "700", "/etc/munge", "/var/lib/munge", "/var/log/munge")
        host.must("chmod", "755", "/run/munge")
        host.must("/usr/sbin/munged", "--force")
    hosts[0].must("/usr/sbin/slurmctld")
    for host in hosts:
        host.must("/usr/sbin/slurmd", "-N", host.name)
    deadline = time.monotonic() + timeout_s
    while (seen := hosts[0].run("sinfo", "--noheader", "--format=%t").stdout.split()) != ["idle"]:
        log = hosts[0].path("/var/spool/slurmctld.log").read_text()
        assert time.monotonic() < deadline, f"nodes are {seen}\n{log[-2000:]}"
        time.sleep(0.2)
