"""The cores that this process may use: its CPU affinity and the quota of the cgroups around it. Needs no package."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where cgroup v2 is mounted
OWN_CGROUP = Path("/proc/self/cgroup")


def affinity() -> set[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS has no affinities


def cpu_quota() -> float | None:
    """Cores that the CPU quota of this process's cgroup (v2), or of one around it, is worth; None: there is no quota.

    A container sees its own cgroup as the root, a Slurm step or a systemd unit is nested in others.
    """
    quotas = []
    for directory in cgroups():
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root has no such file; this controller may be off
            continue
        if quota != "max":
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def usable_cores() -> int:
    """Cores that this process can use at once; at least 1."""
    return within_quota(len(affinity()), cpu_quota())


def within_quota(cores: int, quota: float | None) -> int:
    """As many of `cores` as a quota allows at once; at least 1."""
    return cores if quota is None else max(1, min(cores, int(quota)))


def cgroups() -> list[Path]:
    """The directories of this process's cgroup (v2) and of those around it, the innermost first."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # no Linux
        return []
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    own = CGROUPS / path.strip("/")
    return [own, *(parent for parent in own.parents if parent.is_relative_to(CGROUPS))]
