"""From a configuration to a run. Cheap checks come first, processes last."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import Checkpoint, CheckpointStore, hold
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.data.cursor import Cursor
from gspo_dist.data.prompts import PromptSource
from gspo_dist.data.renewal import RenewedCursor
from gspo_dist.data.training import TrainingPrompts, load_training
from gspo_dist.evaluation.problem import Suite
from gspo_dist.evaluation.samplers import EngineSampler
from gspo_dist.evaluation.tasks.table import load_suites
from gspo_dist.metrics.jsonl import cut_back
from gspo_dist.metrics.wandb_sink import Mode, choose_mode
from gspo_dist.models.shape import read_shape
from gspo_dist.objectives.objective import Objective
from gspo_dist.rewards.reward import resolve_reward
from gspo_dist.trainer.checkpointing import restore
from gspo_dist.trainer.clockwork import Clockwork, Record, open_record, read_record
from gspo_dist.trainer.collect import sampling_of
from gspo_dist.trainer.episode_page import EPISODES
from gspo_dist.trainer.episodes import Episodes
from gspo_dist.trainer.evaluate import FOLDER, SUITE_IDS, model_setting, suite_prompts
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.health import EVENTS, Health
from gspo_dist.trainer.old_logprobs import OldLogprobs
from gspo_dist.trainer.pipeline import Collector, progress_metrics
from gspo_dist.trainer.profile import ProfileWindow
from gspo_dist.trainer.publisher import PROBE_SEQUENCES, WeightPublisher
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.setup.checks import (
    check_backend,
    check_model,
    check_passed_on,
    check_vocabulary,
    load_tokenizer,
    name_age,
    name_selection,
    resolve_device,
)
from gspo_dist.trainer.setup.engine_check import check_engine
from gspo_dist.trainer.setup.environment import (
    CheckedEnvironment,
    check_environment,
    judged_heldout,
    judged_train,
    start_episodes,
)
from gspo_dist.trainer.setup.factories import (
    begins_equal,
    make_objective,
    make_sinks,
    probe_tolerance,
    resolved_weight_sync,
    sampling_spec,
)
from gspo_dist.trainer.setup.processes import Parts, start_parts
from gspo_dist.trainer.setup.run_folder import prepare_folder
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.trainer.suites import RunSuites
from gspo_dist.types import SamplingSpec


@dataclass(frozen=True)
class Checked:
    """What the checks of a configuration found and read. No process runs yet."""

    config: RunConfig
    run_dir: Path
    objective: Objective
    checkpoint: Checkpoint | None
    """The newest of the run folder, where the run goes on from one."""
    record: Record | None
    """Ticks of an earlier run that are to be repeated."""
    wandb_mode: Mode | None
    """None is without W&B."""
    model: str
    """The model's folder."""
    moe_layers: int
    tokenizer: Any
    train: TrainingPrompts
    heldout: PromptSource | None
    suites: list[Suite]
    device: str
    environment: CheckedEnvironment | None = None

    @property
    def completed_steps(self) -> int:
        """Steps of the run that its checkpoint holds."""
        return self.checkpoint.step if self.checkpoint else 0


def build(config: RunConfig) -> Run:
    """Checks everything that is cheap to check, then starts the processes and assembles the run.

    Raises ValueError (bad input) before any process starts. Raises RuntimeError when the cluster grants no
    resources.
    """
    checked = check_run(config)
    run_dir = checked.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(run_dir))
        prepare_folder(run_dir, config, checked.checkpoint)
        if config.rollout.steps_ahead:
            open_record(run_dir, config, checked.completed_steps)
        episodes = start_episodes(config, checked.environment)
        if episodes is not None:
            stack.callback(episodes.pool.close)
        parts = start_parts(config, checked.model, checked.device, run_dir, checked.moe_layers)
        stack.callback(parts.release)
        if episodes is not None:
            cut_back(run_dir / EPISODES, checked.completed_steps)
        if checked.checkpoint is None:
            (run_dir / EVENTS).unlink(missing_ok=True)
        run = assemble(checked, parts, episodes)
        stack.callback(run.suites.close)
        if checked.checkpoint is not None:
            restore(run, checked.checkpoint)
        run.release = stack.pop_all().close
        return run


def check_run(config: RunConfig) -> Checked:
    """Everything that can be found wrong before a process starts, the quickest first. Raises ValueError."""
    objective = make_objective(config)
    resolve_reward(config.reward)
    check_passed_on(config.learner)
    run_dir = Path(config.run_dir).expanduser().resolve()
    store = CheckpointStore(run_dir, config.checkpoint.keep)
    checkpoint = store.newest() if config.checkpoint.resume else None
    replayed = config.rollout.replay_ticks
    record = read_record(Path(replayed).expanduser(), config) if replayed else None
    # Before the cold start, which trains: a bad key must not cost minutes.
    wandb_mode = choose_mode(config.logger.wandb)
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    environment = check_environment(config, tokenizer)
    train, heldout = load_training(
        config.data,
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.seed,
        **(environment.rendering if environment else {}),
    )
    judged_train(config, train)
    heldout = judged_heldout(config, heldout) if heldout else None
    prompts = [*train, *(heldout or ())]
    vocabulary = read_shape(model).vocab
    check_vocabulary(prompts, vocabulary, model)
    train.add_check(lambda prompt: check_vocabulary([prompt], vocabulary, model))
    if config.evaluation.endpoint is not None:
        raise ValueError(
            "evaluation.endpoint is for gspo evaluate: the suites of a run are answered by its own engines; "
            "unset it"
        )
    suites = load_suites(config.evaluation, config.data.root, config.cluster.env)
    if suites:
        suite_prompts(config, tokenizer).check(suites)
    device = resolve_device(config.cluster)
    check_backend(config, device, model)
    check_engine(model, config, device)
    make_cursor(config, train)  # refuses a query set that is larger than its source
    name_age(config)
    name_selection(config)
    return Checked(
        config,
        run_dir,
        objective,
        checkpoint,
        record,
        wandb_mode,
        model,
        moe_layers,
        tokenizer,
        train,
        heldout,
        suites,
        device,
        environment,
    )


def assemble(checked: Checked, parts: Parts, episodes: Episodes | None = None) -> Run:
    """The run of started parts, at its first step. `build` says what releases it."""
    config, run_dir, learner = checked.config, checked.run_dir, parts.learner
    replicas, budget = config.learner.data_parallel, config.learner.forward_budget
    sinks = make_sinks(config, run_dir, checked.completed_steps, checked.wandb_mode, parts.places)
    exact = config.learner.consistency == "exact"
    guard = OffsetGuard(config.objective, checked.objective, learner, config.seed, budget, exact=exact)
    moe_layers = parts.info.moe_layers or checked.moe_layers
    flips = FlipMeter(config.flips, learner, config.seed, moe_layers, replicas, budget)
    sampling = sampling_spec(config, checked.tokenizer, parts.info)
    heldout, train = checked.heldout, checked.train
    shared = SharedGpus(learner, parts.pool, colocated=config.cluster.colocated)
    collector = Collector(
        config.rollout,
        config.steps,
        parts.pool,
        parts.rewards,
        make_cursor(config, train),
        functools.partial(sampling_of, sampling, config.objective, flips, rollout=config.rollout),
        Clockwork(config.rollout, checked.record, run_dir if config.rollout.steps_ahead else None),
        lambda step, done: sinks.collecting(step, progress_metrics(done)),
        config.objective.selection,
        episodes,
    )
    return Run(
        config=config,
        run_dir=run_dir,
        learner=learner,
        pool=parts.pool,
        rewards=parts.rewards,
        collector=collector,
        suites=make_suites(checked, parts, sampling),
        heldout=list(heldout or ())[: config.evaluation.prompts],
        probe_prompts=list(itertools.islice(heldout or train, PROBE_SEQUENCES)),
        objective=checked.objective,
        guard=guard,
        old_logprobs=OldLogprobs(config.objective, learner, guard, config.learner.forward_token_budget),
        flips=flips,
        publisher=make_publisher(config, parts, checked.device, shared),
        shared=shared,
        profile=ProfileWindow(config.profile, learner, run_dir),
        sinks=sinks,
        health=Health(run_dir, sinks),
        sampling=sampling,
        release=lambda: None,
    )


def make_suites(checked: Checked, parts: Parts, sampling: SamplingSpec) -> RunSuites:
    """The benchmarks of a run.

    Engines are free beside the learner where they are processes that neither sleep nor sample ahead then.
    """
    config = checked.config
    spec = replace(sampling, seed=config.seed + 1)
    prompts = suite_prompts(config, checked.tokenizer)
    free = parts.pool.runs_beside and not config.cluster.colocated and not config.rollout.steps_ahead
    return RunSuites(
        checked.suites,
        EngineSampler(parts.pool, prompts, spec, name=checked.model, first_id=SUITE_IDS),
        checked.run_dir / FOLDER,
        model_setting(config, checked.model),
        every=config.evaluation.every,
        steps=config.steps,
        beside=free,
    )


def make_cursor(config: RunConfig, train: TrainingPrompts) -> Cursor:
    """What hands out the training prompts.

    Raises ValueError where more shall be in play than there are, and for sources that cannot be renewed.
    """
    if not config.data.renewal.is_on:
        return train.cursor(seed=config.seed, shuffle=config.data.shuffle)
    source = next(iter(train.parts.values()))
    if train.weights or not isinstance(source, PromptSource):
        raise ValueError(
            f"data.renewal needs one source that is held in memory: got {', '.join(train.parts)}; unset "
            "data.mixture, raise data.stream_above_mb, or leave data.renewal off"
        )
    return RenewedCursor(source, config.data.renewal, seed=config.seed, shuffle=config.data.shuffle)


def make_publisher(config: RunConfig, parts: Parts, device: str, shared: SharedGpus) -> WeightPublisher:
    """What sends the learner's weights to the engines of a run, and checks them."""
    return WeightPublisher(
        resolved_weight_sync(config, device),
        parts.learner,
        parts.pool,
        replicas=config.learner.data_parallel,
        token_budget=config.learner.forward_budget,
        max_model_len=config.rollout.max_model_len,
        tolerance=probe_tolerance(config),
        begins_equal=begins_equal(config),
        shared=shared,
        # A step may then have no token of the learner's own version to measure the mismatch on.
        probe_always=config.rollout.steps_ahead > 0,
    )
