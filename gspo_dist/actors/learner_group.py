"""The learner group: one actor per rank, driven by the learner's verbs as if it were one learner."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from gspo_dist.actors.process import ASK_S, ActorProcess, Actors, ProcessDied, ProcessTimeout
from gspo_dist.actors.weight_link import LINK_SHARE, WeightLink
from gspo_dist.config import LearnerConfig, WeightSyncConfig
from gspo_dist.failures import CollectiveTimeout, first_line
from gspo_dist.host import Place
from gspo_dist.learners.collectives import PREFIX, Watch, dumps, record_in, stuck_at
from gspo_dist.learners.group import hf_items
from gspo_dist.learners.learner import Learner, OptimStep
from gspo_dist.learners.loss import LossSpec
from gspo_dist.learners.parking import Parking
from gspo_dist.learners.profile import Profiler
from gspo_dist.metrics.stat import Stat, merge_stats
from gspo_dist.packing import MicroBatches, MiniBatch
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.export import write_hf_folder
from gspo_dist.weights.send import SentReport
from gspo_dist.weights.verify import WeightSyncError

START_TIMEOUT_S = 600.0
"""A rank reads the model and meets all others before it answers for the first time."""

SILENCE_S = 15.0
"""What ranks may give up on a collective apart. Who is silent longer has not given up: it never came."""

DEATH_S = 10.0
"""What Ray may take to tell that a rank has ended, after the others have lost their connection to it."""

LearnerFactory = Callable[..., Learner]
"""make(rank=, world_size=, master_addr=, master_port=) -> Learner. Picklable; a call imports its backend."""


class LearnerRank(ActorProcess):
    """One rank's process: builds the learner in place and forwards the verbs of `Learner` to it."""

    _parking: Parking | None = None
    """Made by the first `sleep`."""

    def __init__(self, name: str, log_dir: str) -> None:
        super().__init__(name, log_dir)
        self._log_dir = Path(log_dir)
        self._learner: Learner | None = None
        self._watch: Watch | None = None
        self._link: WeightLink | None = None
        self._profiler = Profiler()

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise RuntimeError(f"{self.name} has no learner yet: call start first")
        return self._learner

    def _awake(self, *, states: bool = True) -> Learner:
        """The learner. RuntimeError where what the verb needs is in host memory (`Parking.require`)."""
        if self._parking is not None:
            self._parking.require(states=states)
        return self.learner

    @property
    def watch(self) -> Watch:
        if self._watch is None:
            raise RuntimeError(f"{self.name} has no learner yet: call start first")
        return self._watch

    def start(self, make: LearnerFactory, config: LearnerConfig, rank: int, address: tuple[str, int]) -> int:
        """Builds the learner, which joins the process group. Returns the replica that this rank belongs to.

        Called once, on all ranks at the same time, before every other verb.
        """
        short = min(config.collective_timeout_s, config.timeout_s)
        self._watch = Watch(self.name, self._log_dir, short, config.timeout_s)
        record_in(self._watch.folder)
        with self._watch.waiting(START_TIMEOUT_S):
            self._learner = make(
                rank=rank, world_size=config.world_size, master_addr=address[0], master_port=address[1]
            )
        return self._learner.data_parallel_rank

    def logprobs(
        self, batches: Sequence[PackedBatch], *, answering: Sequence[str], **options: bool
    ) -> list[LogprobOutput]:
        """`Learner.logprobs`. Ranks that are not among `answering` compute as much and return nothing."""
        with self.watch.computing("logprobs"):
            learner = self._awake(states=options.get("reference", False))
            outputs = learner.logprobs(batches, **options)
        return outputs if self.name in answering else []

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        with self.watch.computing("forward_backward"):
            return {name: stat.cpu() for name, stat in self._awake().forward_backward(batches, spec).items()}

    def optim_step(self) -> OptimStep:
        with self.watch.computing("optim_step"):
            return self._awake().optim_step()

    def send_weights(
        self,
        sync: WeightSyncConfig,
        engines: Mapping[str, Any],
        log_dir: str,
        exporters: Sequence[int] | None = None,
    ) -> SentReport | None:
        """Takes part in the export. An exporter delivers each bucket to its engines and waits for them.

        engines: those of this rank. exporters: the ranks that have some; None is one for all engines, which
        the learner chooses. An exporter returns what it sent, every other rank None.
        """
        with self.watch.waiting(sync.timeout_s):
            return self._send(sync, engines, log_dir, exporters)

    def _send(
        self,
        sync: WeightSyncConfig,
        engines: Mapping[str, Any],
        log_dir: str,
        exporters: Sequence[int] | None,
    ) -> SentReport | None:
        deadline = time.monotonic() + LINK_SHARE * sync.timeout_s
        learner = self._awake(states=False)
        chosen = {} if exporters is None else {"exporters": exporters}
        stream = learner.weights(sync.bucket_bytes, stacked=True, **chosen)
        try:
            if not (learner.is_exporter if exporters is None else engines):
                return None
            if self._link is None or not self._link.reaches(engines):
                self.close_link()
                address, _ = self.host()
                self._link = WeightLink(sync, Actors(engines, Path(log_dir)), address, deadline)
            return self._link.send(stream, deadline)
        except BaseException:
            self.close_link()  # the next publication meets the engines that live then
            raise
        finally:
            # Gathering a bucket is collective: every rank draws all of them, also where the engines failed.
            # A rank that stopped would leave the others waiting in the middle of a gather.
            for _ in stream:
                pass

    def close_link(self) -> None:
        """Leaves the engines. The next `send_weights` meets them again. A second call does nothing."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def export(self, source: str, target: str) -> int | None:
        """Writes the weights as an HF folder and returns their number, or None from the other ranks."""
        with self.watch.waiting():
            learner = self._awake(states=False)
            if learner.is_exporter:
                return write_hf_folder(hf_items(learner), Path(source), Path(target))
            for _ in hf_items(learner):
                pass
            return None

    def start_profile(self) -> None:
        self._profiler.start()

    def stop_profile(self, folder: str, name: str) -> list[str]:
        return [str(path) for path in self._profiler.stop(Path(folder), name)]

    def sleep(self, keep_weights: bool = False) -> int:
        """`Parking.sleep`: leaves the device to a colocated engine. Returns the bytes freed."""
        if self._parking is None:
            self._parking = Parking(self.learner)
        with self.watch.waiting():
            return self._parking.sleep(keep_weights=keep_weights)

    def wake_up(self, weights_only: bool = False) -> int:
        """`Parking.wake_up`. Does nothing to a rank that never slept."""
        return 0 if self._parking is None else self._parking.wake_up(weights_only=weights_only)

    def save(self, folder: str) -> None:
        """Begins to save this rank's part. `wait_saved` ends it. ValueError: this node has no such folder."""
        if not Path(folder).is_dir():
            raise ValueError(
                f"checkpoint folder {folder} is not visible on {socket.gethostname()}: run_dir must lie on a "
                "file system that all nodes share"
            )
        with self.watch.waiting():
            self._awake().save(Path(folder))

    def load(self, folder: str) -> None:
        with self.watch.waiting():
            self._awake().load(Path(folder))

    def wait_saved(self) -> None:
        with self.watch.waiting():
            self.learner.wait_saved()


class RayLearnerGroup:
    """All ranks as one: `gspo_dist.learners.group.LearnerGroup` over actors.

    Every rank gets the micro-batches of its replica, and the answers are merged. Every verb waits for all
    ranks. It raises ProcessDied or ProcessTimeout, naming the rank, or what a rank raised; the group is then
    of no more use, because the other ranks may wait in a collective.
    """

    def __init__(
        self,
        config: LearnerConfig,
        make: LearnerFactory,
        options: Sequence[Mapping[str, Any]],
        log_dir: Path,
        exporters: Mapping[str, int] | None = None,
    ) -> None:
        """Creates the actors. `start` builds their learners.

        options: Ray's, one mapping per rank.
        exporters: engine -> the rank that sends it weights, on its own host. None: one rank sends to all.
        """
        self.config = config
        self.exporters = exporters
        remote = ray.remote(LearnerRank)
        handles = {
            f"learner-{rank}": remote.options(**options[rank]).remote(f"learner-{rank}", str(log_dir))
            for rank in range(config.world_size)
        }
        self.actors = Actors(handles, log_dir)
        self.make = make
        self.policy_version = 0
        self.replica_of: dict[str, int] = {}
        """Rank's name -> the data-parallel replica that it belongs to. `start` fills it."""

    def start(self) -> None:
        """Builds every rank's learner. They meet in a process group. Called once.

        It is no part of the constructor, because the engines must begin to load before this waits.
        """
        handles = self.actors.handles
        first = {"learner-0": handles["learner-0"].host.remote()}
        address = self.actors.gather(first, START_TIMEOUT_S)["learner-0"]
        refs = {
            name: handle.start.remote(self.make, self.config, rank, address)
            for rank, (name, handle) in enumerate(handles.items())
        }
        self.replica_of = self._gather(refs, max(START_TIMEOUT_S, self.config.timeout_s))

    def _gather(self, refs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """`Actors.gather`. Its error also says which ranks were silent, and where dumps are."""
        begun = time.time()
        try:
            return self.actors.gather(refs, timeout)
        except (ProcessDied, ProcessTimeout) as error:
            if isinstance(error, CollectiveTimeout):
                self._name_silent(refs, error)
            found = dumps(self.actors.log_dir, begun)
            if found:
                command = f"torchfrtrace --prefix {PREFIX} --allow-incomplete-ranks {found[0].parent}"
                error.add_note(
                    f"dumps of the flight recorder: {', '.join(map(str, found))}; compare the ranks by "
                    f"{command} (-j shows all of it)"
                )
            raise
        except Exception as error:
            # A collective breaks in the ranks that are left, which may say so before Ray tells of the death.
            death = self.actors.death_among(refs, DEATH_S)
            if death is None:
                raise
            death.add_note(f"another rank's error came first: {first_line(error)}")
            raise death from error

    def _name_silent(self, refs: Mapping[str, Any], error: CollectiveTimeout) -> None:
        """Notes the ranks that answer nothing while the others give up: those that are waited for."""
        _, silent = ray.wait(list(refs.values()), num_returns=len(refs), timeout=SILENCE_S)
        for name in (name for name, ref in refs.items() if ref in silent):
            path = self.actors.log_dir / f"{name}.log"
            lines = stuck_at(path.read_text(errors="replace")) if path.is_file() else []
            where = "\n".join(["  it was at", *(f"    {line}" for line in lines)])
            error.add_note(
                f"{name} has not answered at all: the others wait for it\n"
                + (where if lines else self.actors.tail(name))
            )

    def _call(self, method: str, *args: Any, timeout: float) -> dict[str, Any]:
        """The same call on every rank. Returns answers by name. Raises what `_gather` raises."""
        handles = self.actors.handles.items()
        return self._gather({n: getattr(handle, method).remote(*args) for n, handle in handles}, timeout)

    def _scatter(self, method: str, micro_batches: MicroBatches, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Calls `method(micro_batches of its replica, ...)` on every rank.

        Each replica's data is stored once. Example: four ranks, tensor parallel 2, replica_of = learner-0: 0,
        learner-1: 0, learner-2: 1, learner-3: 1. The first two read the same stored micro_batches[0].
        """
        parts = [ray.put(list(batches)) for batches in micro_batches]
        refs = {
            name: getattr(self.actors.handles[name], method).remote(parts[replica], *args, **kwargs)
            for name, replica in self.replica_of.items()
        }
        return self._gather(refs, self.config.timeout_s)

    def logprobs(
        self,
        micro_batches: MicroBatches,
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[list[LogprobOutput]]:
        # The ranks of a replica would all give the same answer, and routes (R2) are gigabytes: one is asked.
        first: dict[int, str] = {}
        for name, replica in self.replica_of.items():
            first.setdefault(replica, name)
        answers = self._scatter(
            "logprobs",
            micro_batches,
            answering=tuple(first.values()),
            record_routing=record_routing,
            record_scores=record_scores,
            reference=reference,
        )
        return [answers[first[replica]] for replica in range(len(micro_batches))]

    def forward_backward(self, mini: MiniBatch, spec: LossSpec) -> dict[str, Stat]:
        return merge_stats(list(self._scatter("forward_backward", mini.micro_batches, spec).values()))

    def optim_step(self) -> OptimStep:
        step = self._call("optim_step", timeout=self.config.timeout_s)["learner-0"]
        self.policy_version = step.policy_version
        return step

    def send_weights(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> SentReport:
        log_dir = str(self.actors.log_dir)
        if self.exporters is None or sync.transport not in ("auto", "shm"):
            answers = self._call("send_weights", sync, dict(engines), log_dir, timeout=sync.timeout_s)
        else:
            own: dict[str, dict[str, Any]] = {name: {} for name in self.actors.handles}
            for engine, handle in engines.items():
                own[f"learner-{self.exporters[engine]}"][engine] = handle
            ranks = sorted({self.exporters[engine] for engine in engines})
            refs = {
                name: rank.send_weights.remote(sync, own[name], log_dir, ranks)
                for name, rank in self.actors.handles.items()
            }
            answers = self._gather(refs, sync.timeout_s)
        return one_report({name: report for name, report in answers.items() if report is not None})

    def export(self, source: Path, target: Path) -> int:
        """Writes an HF folder on the exporter's host. Returns the number of tensors."""
        answers = self._call("export", str(source), str(target), timeout=self.config.timeout_s)
        return next(count for count in answers.values() if count is not None)

    def save(self, folder: Path) -> None:
        self._call("save", str(folder), timeout=self.config.timeout_s)

    def load(self, folder: Path, policy_version: int) -> None:
        self._call("load", str(folder), timeout=self.config.timeout_s)
        self.policy_version = policy_version

    def wait_saved(self) -> None:
        self._call("wait_saved", timeout=self.config.timeout_s)

    def start_profile(self, ranks: Sequence[int]) -> None:
        refs = {f"learner-{r}": self.actors.handles[f"learner-{r}"].start_profile.remote() for r in ranks}
        self.actors.gather(refs, self.config.timeout_s)

    def stop_profile(self, ranks: Sequence[int], folder: Path) -> list[Path]:
        refs = {
            f"learner-{r}": self.actors.handles[f"learner-{r}"].stop_profile.remote(str(folder), f"rank-{r}")
            for r in ranks
        }
        answers = self.actors.gather(refs, self.config.timeout_s)
        return [Path(path) for files in answers.values() for path in files]

    def sleep(self, *, keep_weights: bool = False) -> None:
        self._call("sleep", keep_weights, timeout=self.config.timeout_s)

    def wake_up(self, *, weights_only: bool = False) -> None:
        self._call("wake_up", weights_only, timeout=self.config.timeout_s)

    def places(self) -> dict[str, Place]:
        """Where each rank runs."""
        return self.actors.call_all("place", timeout=ASK_S)

    def peak_memory(self) -> dict[str, dict[str, int]]:
        return self.actors.peak_memory()

    def close(self) -> None:
        self.actors.kill()


def one_report(reports: Mapping[str, SentReport]) -> SentReport:
    """What several exporters sent of one publication: it must be the same.

    WeightSyncError names a rank that sent something else than the first one.
    """
    (first, sent), *others = reports.items()
    if not others:
        return sent
    for name, report in others:
        if report.checksums != sent.checksums or report.tensors != sent.tensors:
            odd = sorted(
                tensor
                for tensor in report.checksums.keys() | sent.checksums.keys()
                if report.checksums.get(tensor) != sent.checksums.get(tensor)
            )
            raise WeightSyncError(f"{name} and {first} sent other weights, first {(odd or ['none'])[0]}")
    slowest = max(report.seconds_checking for report in reports.values())
    return replace(sent, seconds_checking=slowest)
