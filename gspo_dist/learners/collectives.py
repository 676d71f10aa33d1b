"""How long a learner's collectives may take, and what is left to read when one took longer.

A rank that is stuck lets all others wait for it. Within a call that computes, nobody waits longer for the
slowest rank than that rank computes, so minutes are plenty (`learner.collective_timeout_s`). Elsewhere one
rank may rightly be busy for long: reading a model, compiling kernels the first time, writing a checkpoint,
waiting for an engine. There the limit is that of the whole call (`learner.timeout_s`).

torch's flight recorder remembers the last collectives of a rank with the lines that called them. NCCL's
watchdog writes its dumps before it ends the process; under gloo the rank writes one itself. The two have one
format, which torch's command `torchfrtrace` reads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from gspo_dist.failures import CollectiveTimeout, first_line

FOLDER, PREFIX = "flight_recorder", "rank_"
"""Where dumps go below the folder of logs, and how their names begin."""
STACK_LINES = 8
"""Of a stuck rank's stack, in an error."""
TIMED_OUT = ("Timed out waiting", "collective operation timeout")
"""What gloo and NCCL say (torch 2.13); both raise a RuntimeError."""


class Watch:
    """Bounds the collectives of one rank, call by call."""

    def __init__(self, name: str, log_dir: Path, collective_s: float, call_s: float) -> None:
        """name: the rank's, for messages. collective_s: within calls that compute. call_s: elsewhere."""
        self.name, self.folder = name, log_dir / FOLDER
        self.collective_s, self.call_s = collective_s, call_s
        self.known: set[str] = set()
        """Computing calls that were made once, so that what they compile is there."""

    @contextlib.contextmanager
    def computing(self, call: str) -> Iterator[None]:
        """Around a call that computes: the short limit, from its second time on."""
        first = call not in self.known
        knob = "learner.timeout_s, for the first time" if first else "learner.collective_timeout_s"
        with self._limited(self.call_s if first else self.collective_s, knob):
            yield
        self.known.add(call)

    @contextlib.contextmanager
    def waiting(self, call_s: float | None = None) -> Iterator[None]:
        """Around any other call. call_s: its own limit, where that is longer."""
        with self._limited(max(self.call_s, call_s or 0.0), "learner.timeout_s"):
            yield

    @contextlib.contextmanager
    def _limited(self, seconds: float, knob: str) -> Iterator[None]:
        set_timeout(seconds)
        # The stuck rank is the one that raises nothing. Where it is, stands in its log by the time that the
        # others have waited long enough. A call may also take that long and be well: it goes on.
        faulthandler.dump_traceback_later(seconds, file=2)
        try:
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in TIMED_OUT):
                raise
            raise CollectiveTimeout(
                f"{self.name} waited {seconds:.0f} s ({knob}) in {self._evidence()}: {first_line(error)}"
            ) from error
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _evidence(self) -> str:
        """The collective that was waited in, in words. Writes the dump; what only records never fails."""
        try:
            from torch._C import _distributed_c10d as c10d

            # Private in torch 2.13, and not in its stubs.
            recorded = c10d._dump_fr_trace()  # type: ignore[attr-defined]
            trace = pickle.loads(recorded) | {"pg_config": _groups()}
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{PREFIX}{_rank()}").write_bytes(pickle.dumps(trace))
            return told(trace)
        except Exception as error:
            print(f"no dump of the flight recorder: {type(error).__name__}: {error}", flush=True)
            return "a collective"


def record_in(folder: Path) -> None:
    """Tells torch's flight recorder where to dump. What the environment says already stays.

    Before the process group is made.
    """
    # torch 2.13 writes to the home folder of each host otherwise. The second is the older name.
    if not {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"} & os.environ.keys():
        with contextlib.suppress(OSError):  # it only records
            folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / PREFIX)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def set_timeout(seconds: float) -> None:
    """The longest that a collective of any process group of this process may take from now on."""
    from torch.distributed import distributed_c10d

    if not distributed_c10d.is_initialized():
        return
    # DeepSpeed and megatron-core make groups of their own, some with torch's default. torch 2.13 has no
    # public list of them.
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank()


def _groups() -> dict[str, dict[str, str]]:
    """Every process group and its ranks as a dump holds them. gloo tells the recorder none (torch 2.13)."""
    from torch.distributed.distributed_c10d import _world

    return {
        name: {"name": name, "desc": group.group_desc, "ranks": str(sorted(_world.pg_group_ranks[group]))}
        for group, name in _world.pg_names.items()
    }


def told(trace: dict[str, Any]) -> str:
    """The last collective of a dump in words.

    Example: gloo:all_reduce of [[2]], number 12 of group default_pg, called at learner.py:205 (_same_count).
    """
    last = max(trace["entries"], key=lambda entry: entry["record_id"])
    callers = [f for f in last.get("frames", ()) if "/torch/" not in f["filename"]]
    where = f", called at {Path(callers[0]['filename']).name}:{callers[0]['line']}" if callers else ""
    where += f" ({callers[0]['name']})" if callers else ""
    number = last["p2p_seq_id"] if last["is_p2p"] else last["collective_seq_id"]
    group = last["process_group"]
    name = group[1] if group[1] not in ("", "undefined") else group[0]
    return f"{last['profiling_name']} of {last['input_sizes']}, number {number} of group {name}{where}"


def stuck_at(log: str) -> list[str]:
    """The innermost lines of a rank's main thread at the time of its last timeout, out of its log.

    Empty where the log has none. faulthandler names the innermost line first, and the main thread last.
    """
    _, mark, stacks = log.rpartition("Timeout (")
    if not mark:
        return []
    main = stacks.rpartition("hread 0x")[2].splitlines()
    lines = [line.strip() for line in main if line.startswith("  File ")]
    return lines[:STACK_LINES]


def dumps(log_dir: Path, since: float) -> list[Path]:
    """Dumps that were written after `since`, seconds since the epoch, in the order of the ranks."""
    found = [
        path
        for path in (log_dir / FOLDER).glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit() and path.stat().st_mtime >= since
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))
