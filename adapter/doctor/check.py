"""A check, and what it looks at.

A check takes the Case and returns a Row: what was found, and what to do about it; or None where it has nothing to say
of such a machine or job. The checks are in host.py (this machine and what is installed), launched.py (a job's config
and its launcher's environment) and job.py (what the ranks of a real job told), each with a list at its end: a new check
is one function and its name there. None imports a package that may be broken: what the packages say of themselves was
asked in a process of its own (probe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapter.doctor import machine
from adapter.parallel.launchers import Launch

if TYPE_CHECKING:
    from adapter.config.load import Config

OK, WARNING, FAILED = "ok", "warning", "failed"
PATIENCE_S = 60.0  # with a check


@dataclass(frozen=True)
class Row:
    check: str
    status: str
    found: str
    do: str = ""


@dataclass(frozen=True)
class Case:
    """What the checks look at.

    place: of this rank, None where it was started without a launcher. ranks: of a job on this host, as started or as
    asked about. packages: import name -> what probe.py found. trial: what the ranks of a real job told, None: there was
    none.
    """

    environ: Mapping[str, str]
    ranks: int = 1
    place: Launch | None = None
    packages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Config | None = None
    trial: Mapping[str, Any] | None = None

    @property
    def several_hosts(self) -> bool:
        return self.place is not None and not self.place.one_host

    def facts(self, package: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.packages.get(package, {}).get("facts", {})
        return found

    @property
    def on_cpu(self) -> bool:
        return bool(self.facts("deepspeed").get("accelerator", "cpu") == "cpu")


Check = Callable[[Case], Row | None]


def run(checks: Iterable[Check], case: Case) -> Iterator[Row]:
    """A row of each check that has something to say; one that itself breaks or hangs is a row too."""
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            row = machine.bounded(partial(check, case), PATIENCE_S)
        except Exception as error:
            row = Row(name, FAILED, f"the check itself broke: {type(error).__name__}: {error}",
                      "see whether the message explains it; else report it with all of this")
        if row is not None:
            yield Row(**{**asdict(row), "check": name})


def ok(found: str) -> Row:
    return Row("", OK, found)


def warning(found: str, do: str) -> Row:
    return Row("", WARNING, found, do)


def failed(found: str, do: str) -> Row:
    return Row("", FAILED, found, do)
