"""`gspo doctor --cluster`: a line per host of a Ray cluster, and where the hosts differ."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gspo_dist.cli import doctor
from gspo_dist.cli.exits import guarded
from gspo_dist.cli.findings import Check
from gspo_dist.config import ClusterConfig

CLOCK_S = 1.0
"""Clocks further apart than this put the lines of two hosts' logs into the wrong order."""


@dataclass(frozen=True)
class Facts:
    """What one host says of itself."""

    checks: list[Check]
    """The checks of `gspo doctor` there."""
    versions: dict[str, str]
    """Package -> version, of those that the lock pins, and of Python."""
    seen: list[str]
    """Folders in which the mark of the asking host was found."""

    def detail(self, name: str) -> str:
        """What the check `name` found."""
        return next((check.detail for check in self.checks if check.name == name), "")


def main(address: str, folders: Sequence[str]) -> NoReturn:
    """Prints a line per host. Status 1 where one of them cannot run, or differs so that a run would fail."""
    report, sound = guarded(lambda: diagnose_cluster(address, [Path(f) for f in folders] or [Path.cwd()]))
    print(report)
    raise SystemExit(0 if sound else 1)


def diagnose_cluster(address: str, folders: Sequence[Path]) -> tuple[str, bool]:
    """The report on the cluster at `address`, and whether all hosts can take part in one run.

    folders: those that all hosts must share (the run folder, the model). Each gets a mark for a moment.
    """
    from gspo_dist.actors.everywhere import ask_every_host
    from gspo_dist.actors.session import start_ray, stop_ray

    marks = {folder.expanduser().resolve(): f".gspo-doctor-{secrets.token_hex(8)}" for folder in folders}
    start_ray(ClusterConfig(address=address))
    try:
        for folder, mark in marks.items():
            (folder / mark).write_text(mark)
        answers = ask_every_host(gather, {str(folder): mark for folder, mark in marks.items()})
    finally:
        for folder, mark in marks.items():
            (folder / mark).unlink(missing_ok=True)
        stop_ray()
    first = next((answer.value for answer in answers if isinstance(answer.value, Facts)), None)
    lines, sound = [], True
    for answer in answers:
        title = f"{answer.node.name:<16} {answer.node.address:<15}"
        if not isinstance(answer.value, Facts) or first is None:
            lines.append(f"missing {title} no answer: {answer.value}")
            sound = False
            continue
        broken, doubtful = compare(answer.value, first, answer.clock_s, [str(folder) for folder in marks])
        status = "missing" if broken else "warn" if doubtful else "ok"
        lines.append(f"{status:<8}{title} {summary(answer.value, answer.clock_s)}")
        lines += [f"{'':<8}-> {problem}" for problem in (*broken, *doubtful)]
        sound = sound and not broken
    count = f"{len(answers)} host{'' if len(answers) == 1 else 's'}"
    return "\n".join([*lines, f"{count}: {'fit for one run' if sound else 'not fit for one run'}"]), sound


def gather(marks: Mapping[str, str]) -> Facts:
    """Runs on a host: its own report, and which of the marked folders it sees."""
    root = Path(__file__).resolve().parents[2]
    pins = doctor.read_pins(root, gpu=doctor.installed("vllm") is not None)
    versions = {name: version for name in pins if (version := doctor.installed(name)) is not None}
    return Facts(
        checks=doctor.diagnose(root),
        versions={**versions, "python": platform.python_version()},
        seen=[folder for folder, mark in marks.items() if _reads(Path(folder) / mark, mark)],
    )


def compare(
    facts: Facts, first: Facts, clock_s: float, folders: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(what keeps the host out of a run, what is doubtful), with the way out. `first` is the asking host."""
    lacking = [check for check in facts.checks if check.status == "missing" and check.required]
    broken = [f"{check.name}: {check.detail}; {check.remedy}" for check in lacking]
    unseen = [folder for folder in folders if folder not in facts.seen]
    if unseen:
        broken.append(
            f"does not see {', '.join(unseen)}: runs write there from every host; use a shared file system"
        )
    differing = sorted(
        name
        for name in {*facts.versions, *first.versions}
        if facts.versions.get(name) != first.versions.get(name)
    )
    if differing:
        pairs = [(n, facts.versions.get(n, "absent"), first.versions.get(n, "absent")) for n in differing]
        told = ", ".join(f"{name} {here} (the first host: {there})" for name, here, there in pairs[:3])
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        broken.append(f"other packages: {told}{more}; use one environment for all hosts")
    doubtful = [
        f"{check.name}: {check.detail}; {check.remedy}"
        for check in facts.checks
        if check.status == "warn" and check.name in ("/dev/shm", "RDMA", "host name", "GPUs")
    ]
    if facts.detail("GPUs") != first.detail("GPUs"):
        doubtful.append(f"other GPUs than the first host, which has {first.detail('GPUs')}")
    if abs(clock_s) > CLOCK_S:
        doubtful.append(f"its clock is {clock_s:+.1f} s off the first host's: run NTP or chrony on both")
    return broken, doubtful


def summary(facts: Facts, clock_s: float) -> str:
    """What a host has, in one line."""
    gpus = facts.detail("GPUs")
    parts = [
        "no GPU" if gpus.startswith("none") else gpus,
        f"{facts.detail('cores')} cores",
        facts.detail("memory"),
        f"/dev/shm {facts.detail('/dev/shm').split(':')[0]}",
        *([f"RDMA {facts.detail('RDMA')}"] if not facts.detail("RDMA").startswith(("no", "not")) else []),
        f"clock {clock_s:+.2f} s",
    ]
    return ", ".join(parts)


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
