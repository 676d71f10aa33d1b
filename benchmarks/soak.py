"""Kills engines, learner ranks, reward workers and the driver of a run at random, and checks what is left.

    python benchmarks/soak.py --minutes 60 --kill-every 5 --seed 0
    python benchmarks/soak.py --minutes 5 -- experiment=quickstart rollout.steps_ahead=2

The run is the quickstart with rollouts begun one step ahead, unless overrides follow `--`. It saves after
every step. A driver that ends is started again, as an operator would do. Kills begin after the first step and
stop after `--minutes` or `--kills`. The time to the next kill runs slowly until the run has made a step.
After the last one it goes on by itself, and ends. The exit status is 1 unless:

- Every prompt that the cursor handed out was trained exactly once, in order, and every rollout id once.
- metrics.jsonl has every step once.
- No weight bucket of a dead process is left in /dev/shm.
- Memory and open descriptors of the run have not grown by more than a quarter. Compared are the means over
  the first and the last third of the samples in which all processes were up. With fewer than 300 of them,
  one a second, growth is shown and not judged: processes that have just begun still grow.

`--folder` keeps the run, its drivers' log and every sample of memory and descriptors (soak.jsonl).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from gspo_dist.metrics.jsonl import METRICS, SAMPLES, read_jsonl
from gspo_dist.trainer.health import EVENTS

DEFAULT = ["experiment=quickstart", "rollout.steps_ahead=1", "evaluation.every=0", "flips.every=0"]
KINDS = {
    "engine": "ray::EngineProcess",
    "learner": "ray::LearnerRank",
    "reward actor": "ray::RewardWorker",
    "reward process": "gspo_dist.rewards.worker",
    "driver": "",
}
"""What can be killed -> what its command line contains."""
GROWTH = 1.25
"""Memory and descriptors at the end, as a multiple of those at the start, may be so high."""
START_S = 900.0
"""Longest wait for a step of a new driver: the model may be made first."""
DAEMONS_S = 20.0
"""The actors of a killed driver may take so long to end by themselves."""
RECOVERING = 0.03
"""How fast the time to the next kill runs until the run has made a step since the last one. At full speed a
host that is slow to start processes would see no step between two kills.
"""
ENOUGH = 300
"""Samples of memory and descriptors from which growth is judged."""
END = 10_000
"""Steps that the command asks for: more than a soak makes. The last driver is told how many there were."""


class Soak:
    """One run, its driver of the moment, and what was seen."""

    def __init__(self, folder: Path, overrides: list[str], rng: random.Random) -> None:
        self.folder, self.overrides, self.rng = folder, overrides, rng
        self.kills: collections.Counter[str] = collections.Counter()
        self.drawn: str | None = None
        """The kind of the next victim."""
        self.starts = 0
        self.samples: list[tuple[int, int, int]] = []
        """(processes, resident bytes, open descriptors) of the run, every second."""
        self.driver: subprocess.Popen[bytes] | None = None
        self.step_at_start = 0
        """Steps that were done when the driver of the moment was started."""
        self.left_before = set(left_buckets())
        """Dead buckets of earlier runs are not this one's."""

    def start(self, steps: int) -> None:
        """Starts a driver: the same command every time."""
        self.starts += 1
        command = [
            sys.executable, "-m", "gspo_dist", "train", *self.overrides, f"steps={steps}",
            f"run_dir={self.folder / 'run'}", "checkpoint.every=1", "checkpoint.keep=2", "logger=quiet",
            "data.heldout=null", "checkpoint.restarts=1000",
            "logger.samples_per_step=1000000",  # all of them: they are the record of what was trained
        ]  # fmt: skip
        log = open(self.folder / "driver.log", "ab")  # noqa: SIM115 - as long as the driver lives
        self.step_at_start = self.completed()
        self.driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def tree(self) -> list[psutil.Process]:
        """The driver and all below it, Ray's daemons and workers among them."""
        assert self.driver is not None
        try:
            parent = psutil.Process(self.driver.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill_one(self) -> str | None:
        """SIGKILL to a process of the kind that was drawn. Returns the kind; None: it has no process yet.

        A kind is drawn once for each kill. While a driver comes up it alone has a process, so that drawing
        again would make it the victim more often than the others.
        """
        kind = self.drawn = self.drawn or self.rng.choice(list(KINDS))
        if kind == "driver":
            return self.kill_driver()
        victims = []
        for process in self.tree()[1:]:
            try:
                if KINDS[kind] in " ".join(process.cmdline()):
                    victims.append(process)
            except psutil.Error:
                continue
        if not victims:
            return None
        victim = self.rng.choice(sorted(victims, key=lambda p: p.pid))
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return None
        return kind

    def kill_driver(self) -> str | None:
        """SIGKILL to the driver. Its actors should end by themselves, and are waited for."""
        left = self.tree()
        if not left or self.driver is None:
            return None
        self.driver.kill()
        self.driver.wait()
        # Daemons and idle workers of Ray (2.60) outlive a killed driver by minutes: nobody waits for them.
        ours = [process for process in left[1:] if is_ours(process)]
        _, alive = psutil.wait_procs(ours, timeout=DAEMONS_S)
        for process in alive:
            print(f"  still there {DAEMONS_S:.0f} s after its driver: {process.pid}", flush=True)
        for process in left[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return "driver"

    def look(self) -> None:
        """Counts memory and descriptors, where all is up: this driver has done a step."""
        if self.completed() <= self.step_at_start:
            return
        memory = descriptors = 0
        tree = self.tree()
        try:
            for process in tree:
                memory += process.memory_info().rss
                descriptors += process.num_fds()
        except psutil.Error:
            return
        self.samples.append((len(tree), memory, descriptors))
        row = {"time": round(time.time()), "kills": sum(self.kills.values()), "step": self.completed()}
        row |= {"processes": len(tree), "resident_bytes": memory, "descriptors": descriptors}
        with open(self.folder / "soak.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def completed(self) -> int:
        """The last step in metrics.jsonl."""
        rows = read_jsonl(self.folder / "run" / METRICS)
        return int(rows[-1]["step"]) if rows else 0

    def has_ended(self) -> bool:
        """Whether the driver of the moment has."""
        assert self.driver is not None
        return self.driver.poll() is not None

    def last_words(self) -> SystemExit:
        """The end of the soak, with the end of the drivers' log."""
        return SystemExit((self.folder / "driver.log").read_text(errors="replace")[-6000:])

    def run(self, minutes: float, kill_every: float, kills: int) -> int:
        """Kills for `minutes`, `kills` times at most, then lets the run end. Returns its steps."""
        self.start(END)
        give_up = time.monotonic() + START_S
        while self.completed() < 1:
            time.sleep(1.0)
            if self.has_ended() or time.monotonic() > give_up:
                raise self.last_words()
        until = time.monotonic() + 60 * minutes
        before, left = time.monotonic(), kill_every * self.rng.uniform(0.0, 2.0)
        at_kill = 0  # steps
        while time.monotonic() < until and sum(self.kills.values()) < kills:
            time.sleep(1.0)
            now = time.monotonic()
            left -= (now - before) * (1.0 if self.completed() > at_kill else RECOVERING)
            before = now
            if self.has_ended():
                self.start(END)
            self.look()
            if left <= 0:
                kind = self.kill_one()
                if kind is not None:
                    self.drawn = None
                    self.kills[kind] += 1
                    count = sum(self.kills.values())
                    print(f"{count:4d} killed: {kind}, after step {self.completed()}", flush=True)
                    before, left = time.monotonic(), kill_every * self.rng.uniform(0.0, 2.0)
                    at_kill = self.completed()
        self.outlive()
        return self.finish()

    def outlive(self) -> None:
        """Waits until the run has gone on from the last kill by itself: one more step than it had."""
        wanted, give_up = self.completed() + 1, time.monotonic() + START_S
        while self.completed() < wanted:
            time.sleep(1.0)
            if self.has_ended():
                self.start(END)
            if time.monotonic() > give_up:
                raise self.last_words()

    def finish(self) -> int:
        """Ends the run: the last driver is asked for the steps that are done, and one more."""
        self.kill_driver()
        steps = self.completed() + 1
        for _ in range(3):
            self.start(steps)
            assert self.driver is not None
            if self.driver.wait(timeout=START_S) == 0:
                return steps
        raise self.last_words()


def is_ours(process: psutil.Process) -> bool:
    """Whether it is of a kind that can be killed: an engine, a learner, a reward worker."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(kind and kind in command for kind in KINDS.values())


def problems(soak: Soak, steps: int) -> list[str]:
    """What does not hold of the finished run. Prints what memory and descriptors did."""
    run, found = soak.folder / "run", []
    metrics = [row["step"] for row in read_jsonl(run / METRICS)]
    if [step for step in metrics if step] != list(range(1, steps + 1)):
        found.append(f"metrics.jsonl has the steps {metrics[:5]} ... {metrics[-5:]}, not 1 to {steps}")
    samples = read_jsonl(run / SAMPLES)
    ids = [row["rollout_id"] for row in samples]
    config = json.loads((run / "config.json").read_text())
    size = config["rollout"]["group_size"]
    if ids != list(range(steps * config["rollout"]["prompts_per_step"] * size)):
        wrong = next((i for i, got in enumerate(ids) if got != i), len(ids))
        found.append(f"{len(ids)} rollouts were trained; the first out of order is number {wrong}")
    trained = [row["prompt"] for row in samples[::size]]
    wanted = handed_out(config, len(trained))
    if trained != wanted:
        wrong = next(
            (i for i, (a, b) in enumerate(zip(trained, wanted, strict=False)) if a != b), len(trained)
        )
        found.append(f"group {wrong} has another prompt than the cursor handed out")
    buckets = sorted(set(left_buckets()) - soak.left_before)
    if buckets:
        found.append(f"weight buckets are left in /dev/shm: {buckets}")
    # A process that starts beside the one that it replaces makes more than all: the usual number is all.
    whole = statistics.mode(count for count, _, _ in soak.samples) if soak.samples else 0
    full = [sample for sample in soak.samples if sample[0] == whole]
    third = len(full) // 3
    if third:
        for place, what in ((1, "resident bytes"), (2, "open descriptors")):
            first = statistics.mean(sample[place] for sample in full[:third])
            last = statistics.mean(sample[place] for sample in full[-third:])
            print(f"{what}: {first:,.0f} in the first third of {len(full)} samples, {last:,.0f} in the last")
            if last > GROWTH * first and len(full) >= ENOUGH:
                found.append(f"{what} grew from {first:,.0f} to {last:,.0f}")
    return found


def left_buckets() -> list[str]:
    """Weight buckets in /dev/shm whose writer is dead."""
    return [path.name for path in Path("/dev/shm").glob("gspo-*") if not lives(path)]


def lives(bucket: Path) -> bool:
    """Whether the process that wrote a weight bucket lives: then it is another run's."""
    parts = bucket.name.split("-")
    return len(parts) > 2 and parts[2].isdigit() and Path("/proc", parts[2]).exists()


def handed_out(config: dict, groups: int) -> list[str]:
    """The prompts of the first groups, by a cursor of our own."""
    from gspo_dist.coldstart.make import ensure_model
    from gspo_dist.config import RunConfig
    from gspo_dist.config.mapping import from_mapping
    from gspo_dist.data.training import load_training
    from gspo_dist.trainer.setup.checks import load_tokenizer

    run = from_mapping(RunConfig, config)
    tokenizer = load_tokenizer(str(ensure_model(run.model)))
    train, _ = load_training(
        run.data, tokenizer, max_prompt_tokens=run.rollout.max_prompt_tokens, seed=run.seed
    )
    cursor = train.cursor(seed=run.seed, shuffle=run.data.shuffle)
    return [prompt.text for prompt in cursor.next(groups)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to kill")
    parser.add_argument(
        "--kill-every", type=float, default=30.0, help="seconds from a step to a kill, on average"
    )
    parser.add_argument("--kills", type=int, default=1_000_000, help="stop killing after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the victims and their times")
    parser.add_argument("--folder", type=Path, help="new folder to keep; default: a temporary one")
    parser.add_argument("overrides", nargs="*", default=DEFAULT, help="of gspo train, after --")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="gspo-soak-"))
        Path(folder).mkdir(exist_ok=True)
        soak = Soak(Path(folder), arguments.overrides, random.Random(arguments.seed))
        began = time.monotonic()
        try:
            steps = soak.run(arguments.minutes, arguments.kill_every, arguments.kills)
        finally:
            for process in soak.tree():
                process.kill()
        found = problems(soak, steps)
        events = collections.Counter(row["kind"] for row in read_jsonl(soak.folder / "run" / EVENTS))
    print(f"{steps} steps in {(time.monotonic() - began) / 60:.1f} minutes, seed {arguments.seed}")
    print(f"kills: {sum(soak.kills.values())} {dict(soak.kills)}; drivers started: {soak.starts}")
    print(f"events of the run: {dict(events)}")
    print("PROBLEMS:\n  " + "\n  ".join(found) if found else "every prompt was trained once, in order")
    sys.exit(bool(found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
