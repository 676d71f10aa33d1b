"""Weights & Biases: tried before a run starts, and never in its way afterwards. The only home of wandb.

A bad or missing key with `logger.wandb.mode=online` is a mistake of the settings, so it is refused before
anything heavy starts. A server that cannot be reached is not: the run is logged offline, in its folder, and
`wandb sync` sends it later. With `auto` both fall back to offline. Numbers are uploaded by a process of W&B's
own, in the background. So a server that goes away in the middle of a run costs the wait for one table, and
the wait of FINISH_TIMEOUT_S at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gspo_dist.config import WandbConfig
from gspo_dist.metrics.sinks import Row, SampleRow

log = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

LOGIN_TIMEOUT_S = 25.0
"""For the trial login, which runs in a process of its own. wandb gives up on a server after 10 s. This
ends what does not give up."""
INIT_TIMEOUT_S = 30.0
"""For creating the run on the server."""
FINISH_TIMEOUT_S = 300.0
"""For the last uploads; what is left then stays in the run folder."""

NUMBERS = frozenset({"step", "rollout_id", "reward", "advantage", "tokens"})
"""Columns of the samples' table that are numbers. The others are texts: a W&B column has one type in all
steps, and answers of one file may be 42 and "x+1"."""

LOGIN = """
import json, wandb
try:
    found = wandb.login(prompt=False, verify=True)
    print("VERDICT", json.dumps("accepted" if found else "no key"))
except Exception as error:
    print("VERDICT", json.dumps(str(error)))
"""
"""A trial login; its last line says how it went."""
REJECTED = ("no key", "not logged in", "401", "403", "invalid", "unauthorized", "permission")
"""What a server, or wandb itself, says of a key that it does not take."""


def choose_mode(config: WandbConfig) -> Mode | None:
    """Where the run will be logged, tried now; None for `mode: off`.

    `off`, `offline`, and `auto` without a key start nothing and ask nobody. The others log in for a trial,
    which takes some seconds, at most LOGIN_TIMEOUT_S. Where that fails, the fall back to offline is said.
    Raises ValueError with the way out for `mode: online` with no key, or with one that the server rejects.
    """
    if config.mode == "off":
        return None
    if config.mode == "offline" or (config.mode == "auto" and not has_key()):
        return "offline"
    problem = _try_login()
    if problem is None:
        return "online"
    if config.mode == "online" and any(word in problem.lower() for word in REJECTED):
        raise ValueError(
            f"logger.wandb.mode=online needs a key that {_server()} takes: got {problem!r}; "
            "run `wandb login`, set WANDB_API_KEY, or set logger.wandb.mode=auto, which falls back to offline"
        )
    log.warning("W&B at %s: %s; %s", _server(), problem, OFFLINE)
    return "offline"


OFFLINE = "the run is logged offline, in its folder: `wandb sync` sends it later"


def has_key() -> bool:
    """Whether there is something to log in with: a variable, or an entry of the server in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    host = _server().split("://")[-1].split("/")[0].split(":")[0]
    return netrc.is_file() and host in netrc.read_text(errors="ignore")


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _try_login() -> str | None:
    """What is wrong with the server or the key, or None.

    It runs in a process of its own, because a thread that hangs in wandb could not be ended.
    """
    if not has_key():
        return "no key is set"
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    command = [sys.executable, "-c", LOGIN]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOGIN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {LOGIN_TIMEOUT_S:g} s"
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("VERDICT ")]
    if not verdicts:
        return f"the login ended with status {done.returncode}"
    verdict = json.loads(verdicts[-1].removeprefix("VERDICT "))
    return {"accepted": None, "no key": "no key is set"}.get(verdict, verdict)


def open_wandb(
    mode: Mode, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any], identity: str
) -> WandbSink | None:
    """The sink, offline where the server does not let an online run begin; None where neither works.

    Raises nothing: W&B only records. What fails is said.
    """
    import wandb

    for chosen in dict.fromkeys((mode, "offline")):  # one try for a run that is offline anyway
        try:
            return WandbSink(chosen, config, run_dir, run_config, identity)
        except Exception as error:
            way = OFFLINE if chosen == "online" else "the run is not logged there"
            log.warning("W&B cannot begin the run: %s: %s; %s", type(error).__name__, error, way)
            wandb.teardown()  # what is half begun would answer the next try
    return None


class WandbSink:
    """One W&B run."""

    def __init__(
        self, mode: Mode, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any], identity: str
    ) -> None:
        """Begins the run, or goes on with the one of this identity. Raises what wandb raises."""
        import wandb

        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name,
            tags=config.tags,
            config=dict(run_config),
            dir=str(run_dir),
            mode=mode,
            id=identity,
            resume="allow",
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S
            ),
        )
        self.run.define_metric("*", step_metric="step")
        # A resumed run repeats the steps since its checkpoint, and W&B never forgets a row: it gets each
        # step once.
        self.repeated = int(self.run.summary.get("step", -1))
        self.sends_tables = True
        self.events = 0

    def log(self, step: int, row: Row) -> None:
        """Sends the numbers that are finite."""
        if step > self.repeated:
            self.run.log({"step": step, **{k: v for k, v in row.items() if math.isfinite(v)}})

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Sends the rows as a table. After one that failed it sends none: samples.jsonl has them all.

        An online table, unlike numbers, waits for the server: 10 s per step where that is lost.
        """
        import wandb

        if not rows or not self.sends_tables or step <= self.repeated:
            return
        columns = ["step", *rows[0]]
        data = [[_cell(name, {"step": step, **row}[name]) for name in columns] for row in rows]
        self.sends_tables = False  # until this one has gone
        self.run.log({"step": step, "samples": wandb.Table(columns=columns, data=data)})
        self.sends_tables = True

    def collecting(self, step: int, row: Row) -> None:
        """Sends the numbers, beside those of the step to come."""
        if step > self.repeated:
            self.run.log({"step": step, **row})

    def event(self, step: int, text: str) -> None:
        """Puts the line into the run's summary."""
        self.events += 1
        self.run.summary.update({f"event/{self.events}": f"step {step}: {text}"})

    def image(self, name: str, path: Path) -> None:
        """Sends a copy of the picture."""
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def abandon(self) -> None:
        """Lets go of the run, which is taken up again under its identity."""
        self.run.finish()

    def close(self, summary: Mapping[str, object]) -> None:
        """Sends the summary's numbers and texts. Waits for the last uploads, FINISH_TIMEOUT_S at most."""
        self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float, str))})
        self.run.finish()


def _cell(name: str, value: object) -> object:
    """A number in a column of numbers (None where it is not finite), a text in the others.

    The turns of an episode have a line each.
    """
    if name == "turns" and isinstance(value, list):
        return "\n".join(json.dumps(turn, ensure_ascii=False) for turn in value)
    if name not in NUMBERS:
        return value if isinstance(value, str) else str(value)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
