"""What a check of the doctor looks at, and what it finds.

A check is a function of a Case that returns a Finding, or None where it has nothing to say about such a machine or
job. The checks are in host.py (this machine, what is installed, a job's config) and job.py (what the ranks of a real
job reported), each with a list at its end: a new check is one function and its name there. None imports a package that
may be broken: probe.py asks those in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter.config.load import Config

OK, WARNING, FAILED = "ok", "warning", "failed"
PATIENCE_S = 60.0  # for one check: a name server or a file system may not answer


@dataclass(frozen=True)
class Finding:
    """status: OK, WARNING or FAILED; found: what it saw; do: the remedy, where there is one; check: its name."""

    status: str
    found: str
    do: str = ""
    check: str = ""


@dataclass(frozen=True)
class Trial:
    """What the ranks of a real job reported.

    code and how: how the job ended; steps: rank -> the step it had reached (trial.STEPS); errors: rank -> its error;
    ranks: one row a rank, once all had joined.
    """

    code: int | None
    how: str
    steps: Mapping[int, str] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    ranks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Case:
    """What the checks look at.

    ranks: of the job on this host, as started or as asked for. packages: import name -> what probe.py found. trial:
    None where no job was asked for.
    """

    environ: Mapping[str, str]
    ranks: int = 1
    packages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Config | None = None
    trial: Trial | None = None

    def facts(self, package: str) -> Mapping[str, Any]:
        """What the package said about itself; nothing where it is broken."""
        found: Mapping[str, Any] = self.packages.get(package, {}).get("facts", {})
        return found

    @property
    def on_cpu(self) -> bool:
        return bool(self.facts("deepspeed").get("accelerator", "cpu") == "cpu")


def run(checks: Iterable[Callable[[Case], Finding | None]], case: Case) -> Iterator[Finding]:
    """Yield what each check found; a check that itself breaks or hangs is a finding too."""
    for check in checks:
        try:
            finding = ThreadPoolExecutor(1).submit(check, case).result(PATIENCE_S)
        except Exception as error:
            why = repr(error) if str(error) else f"no answer within {PATIENCE_S:.0f} s"
            finding = Finding(FAILED, f"the check itself broke: {why}",
                              "see whether the message explains it; else report it with all of this")
        if finding is not None:
            yield replace(finding, check=check.__name__.replace("_", " "))
