"""The whole quickstart on one host and on several, compared to the last digit. It takes minutes, so no test:

    python -m tests.integration.quickstart_hosts FOLDER [WAY...] [-- OVERRIDES...]

runs those of `WAYS` that FOLDER does not hold yet (all of them without a name) and prints the comparison.
Stopped runs go on from their newest checkpoint, which is some steps older.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration.hosts import Hosts, end, need_hosts, wait_until
from tests.integration.ray_hosts import ENV, ROOT, join, start_ray_cluster
from tests.integration.slurm import TOOLS, Slurm
from tests.integration.tiny_run import values

STEPS = 30
STOP = 15
WAYS: dict[str, list[tuple[str, int]]] = {
    "one": [("alone", 1)],
    "ray-2-3": [("ray", 2), ("ray", 3)],
    "ray-3-2": [("ray", 3), ("ray", 2)],
    "slurm-2-3": [("slurm", 2), ("slurm", 3)],
}
"""What starts the run, and the number of hosts: of all of it, or until it is stopped and after that."""
RUN_S = 3000.0


def run_way(folder: Path, way: str, overrides: list[str]) -> None:
    """The parts of one way, on hosts that are made anew for each."""
    parts = WAYS[way]
    for number, (launcher, count) in enumerate(parts):
        last = number == len(parts) - 1
        work = folder / f"{way}-{number}"
        work.mkdir(parents=True)
        words = ["experiment=quickstart", f"run_dir={folder / way}", f"steps={STEPS}", *overrides]
        # The model is made once, in the user's own cache: each test cluster has a home folder of its own.
        words.append(f"model.cache_dir={Path('~/.cache/gspo_dist').expanduser()}")
        start = time.monotonic()
        with Hosts(count, work, ENV) as hosts:
            if launcher == "slurm":
                _by_slurm(hosts, work, words, folder / way, last=last)
            else:
                _by_hand(hosts, launcher, words, folder / way, last=last)
        (work / "seconds").write_text(f"{time.monotonic() - start:.0f}")
        places = (folder / way / "logs/places.txt").read_text().splitlines()
        (work / "places").write_text(", ".join(" ".join(line.split()[:2]) for line in places))
    (folder / way / "whole").touch()


def _by_hand(hosts: Hosts, launcher: str, words: list[str], run_dir: Path, *, last: bool) -> None:
    where = ["cluster.address=null"]
    if launcher == "ray":
        start_ray_cluster(hosts, 1)
        for host in list(hosts)[1:]:
            join(host)
        where = ["cluster=ray", f"cluster.nodes={hosts.count}"]
    with (hosts.folder / "run.log").open("w") as log:
        command = [sys.executable, "-m", "gspo_dist", "train", *words, *where]
        run = hosts[0].start(*command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if last:
        if run.wait(RUN_S):
            raise RuntimeError((hosts.folder / "run.log").read_text())
        return
    wait_until(lambda: _step(run_dir) >= STOP, RUN_S, f"step {STOP}", [run])
    end(run, grace_s=30)


def _by_slurm(hosts: Hosts, work: Path, words: list[str], run_dir: Path, *, last: bool) -> None:
    with Slurm(hosts, work / "slurm") as slurm:
        env = {**slurm.env, "GSPO_ROOT": str(ROOT)}
        job = hosts[0].start(
            *("sbatch", "--wait", f"--nodes={hosts.count}", "--gpus-per-node=0", f"--output={work}/run.log"),
            ROOT / "launch/slurm.sbatch",
            *words,
            env=env,
        )
        if last:
            if job.wait(RUN_S):
                raise RuntimeError((work / "run.log").read_text())
        else:
            wait_until(lambda: _step(run_dir) >= STOP, RUN_S, f"step {STOP}", [job])
            hosts[0].run("scancel", "--name=gspo", env=env)
            job.wait(60)
        wait_until(lambda: not _ray(hosts), 60, "the end of what the job started")


def _ray(hosts: Hosts) -> bool:
    return any("raylet" in host.run("ps", "-eo", "comm").stdout.split() for host in hosts)


def _step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    rows = read_jsonl(file) if file.exists() else []
    return int(rows[-1]["step"]) if rows else -1


def table(folder: Path) -> str:
    """The ways that are whole, compared with one host's run."""
    one = values(folder / "one")
    lines = [
        "| way | ran on | seconds | steps | values | that differ | held-out accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, parts in WAYS.items():
        if not (folder / way / "whole").exists():
            continue
        rows = values(folder / way)
        keys = [
            (i, key) for i in range(max(len(rows), len(one))) for key in {**_row(rows, i), **_row(one, i)}
        ]
        differ = [(i, key) for i, key in keys if _row(rows, i).get(key) != _row(one, i).get(key)]
        told = [row["eval/heldout/accuracy"] for row in rows if "eval/heldout/accuracy" in row]
        works = [folder / f"{way}-{number}" for number in range(len(parts))]
        where = "; then ".join((work / "places").read_text() for work in works)
        seconds = " + ".join((work / "seconds").read_text() for work in works)
        lines.append(
            f"| {way} | {where} | {seconds} | {rows[-1]['step']} | {len(keys)} "
            f"| {len(differ)} {differ[:3] or ''} | {told[0]:.3f} to {told[-1]:.3f} |"
        )
    return "\n".join(lines)


def _row(rows: list[dict], i: int) -> dict:
    return rows[i] if i < len(rows) else {}


def main(arguments: list[str]) -> None:
    need_hosts(*TOOLS)
    words, overrides = arguments, list[str]()
    if "--" in arguments:
        cut = arguments.index("--")
        words, overrides = arguments[:cut], arguments[cut + 1 :]
    folder = Path(words[0]).absolute()
    for way in words[1:] or WAYS:
        if not (folder / way / "whole").exists():
            run_way(folder, way, overrides)
    print(table(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
