"""sshd on the hosts of tests/hosts.py, and root's ssh from each to each without a password."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hosts import Host

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
HOME = Path.home()
OWN = "/run"  # each host its own: process ids, which name OpenMPI's files, are the same small numbers on each
SERVER = """\
HostKey {home}/.ssh/id_ed25519
AuthorizedKeysFile {home}/.ssh/id_ed25519.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
PidFile none
SetEnv TMPDIR={own}
"""
CLIENT = "StrictHostKeyChecking no\nLogLevel ERROR\nUserKnownHostsFile /dev/null\n"

need_ssh = pytest.mark.skipif(not SSHD or not shutil.which("ssh-keygen"),
                              reason="LAUNCHERS OVER SSH ARE NOT TESTED: apt-get install openssh-server")


def start_sshd(hosts: Sequence[Host], directory: Path) -> None:
    """It ends with the hosts. directory: where the key is made."""
    key = directory / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    for host in hosts:
        HOME.joinpath(".ssh").mkdir(exist_ok=True)
        host.mount_empty(f"{HOME}/.ssh")
        host.mount_empty(OWN)
        host.path("/run/sshd").mkdir()
        own = host.path(f"{HOME}/.ssh")
        own.joinpath("config").write_text(CLIENT)
        own.joinpath("sshd_config").write_text(SERVER.format(home=HOME, own=OWN))
        for name in (key.name, f"{key.name}.pub"):
            own.joinpath(name).write_bytes((directory / name).read_bytes())
            own.joinpath(name).chmod(0o600)
        host.must(SSHD, "-f", f"{HOME}/.ssh/sshd_config")
