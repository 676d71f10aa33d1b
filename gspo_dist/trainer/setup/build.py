"""From a configuration to a run. Cheap checks come first, processes last."""

from __future__ import annotations

import contextlib
import functools
import itertools
from pathlib import Path

from gspo_dist.checkpoint import CheckpointStore, hold
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.prompts import load_splits
from gspo_dist.metrics.wandb_sink import choose_mode
from gspo_dist.models.shape import read_shape
from gspo_dist.rewards.reward import check_answers, resolve_reward
from gspo_dist.trainer.checkpointing import restore
from gspo_dist.trainer.clockwork import Clockwork, open_record, read_record
from gspo_dist.trainer.collect import sampling_of
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.health import EVENTS, Health
from gspo_dist.trainer.old_logprobs import OldLogprobs
from gspo_dist.trainer.pipeline import Collector, progress_metrics
from gspo_dist.trainer.publisher import PROBE_SEQUENCES, WeightPublisher
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.setup.checks import (
    check_backend,
    check_model,
    check_vocabulary,
    load_tokenizer,
    name_age,
    resolve_device,
)
from gspo_dist.trainer.setup.factories import (
    begins_equal,
    make_objective,
    make_sinks,
    probe_tolerance,
    resolved_weight_sync,
    sampling_spec,
)
from gspo_dist.trainer.setup.processes import start_parts
from gspo_dist.trainer.setup.run_folder import prepare_folder


def build(config: RunConfig) -> Run:
    """Checks everything that is cheap to check, then starts the processes and assembles the run.

    Raises ValueError (bad input) before any process starts; RuntimeError when the cluster
    grants no resources.
    """
    objective = make_objective(config)
    resolve_reward(config.reward)
    run_dir = Path(config.run_dir).expanduser().resolve()
    checkpoint = (
        CheckpointStore(run_dir, config.checkpoint.keep).newest() if config.checkpoint.resume else None
    )
    replayed = config.rollout.replay_ticks
    record = read_record(Path(replayed).expanduser(), config) if replayed else None
    # Before the cold start, which trains: a bad key must not cost minutes.
    wandb_mode = choose_mode(config.logger.wandb)
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    train, heldout = load_splits(
        config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, seed=config.seed
    )
    prompts = [*train, *(heldout or ())]
    check_vocabulary(prompts, read_shape(model).vocab, model)
    check_answers(config.reward, prompts)
    device = resolve_device(config.cluster)
    check_backend(config, device, model)
    name_age(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(run_dir))
        prepare_folder(run_dir, config, checkpoint)
        clockwork = Clockwork(config.rollout, record, run_dir if config.rollout.steps_ahead else None)
        if config.rollout.steps_ahead:
            open_record(run_dir, config, checkpoint.step if checkpoint else 0)
        parts = start_parts(config, model, device, run_dir, moe_layers)
        stack.callback(parts.release)
        if checkpoint is None:
            (run_dir / EVENTS).unlink(missing_ok=True)
        sinks = make_sinks(config, run_dir, checkpoint.step if checkpoint else 0, wandb_mode)
        learner, replicas, budget = parts.learner, config.learner.data_parallel, config.learner.token_budget
        exact = config.learner.consistency == "exact"
        guard = OffsetGuard(config.objective, objective, learner, config.seed, budget, exact=exact)
        moe = parts.info.moe_layers or moe_layers
        flips = FlipMeter(config.flips, learner, config.seed, moe, replicas, budget)
        sampling = sampling_spec(config, tokenizer, parts.info)
        collector = Collector(
            config.rollout,
            config.steps,
            parts.pool,
            parts.rewards,
            PromptCursor(train, seed=config.seed, shuffle=config.data.shuffle),
            functools.partial(sampling_of, sampling, config.objective, flips),
            clockwork,
            lambda step, done: sinks.collecting(step, progress_metrics(done)),
        )
        run = Run(
            config=config,
            run_dir=run_dir,
            learner=learner,
            pool=parts.pool,
            rewards=parts.rewards,
            collector=collector,
            heldout=list(heldout or ())[: config.evaluation.prompts],
            probe_prompts=list(itertools.islice(heldout or train, PROBE_SEQUENCES)),
            objective=objective,
            guard=guard,
            old_logprobs=OldLogprobs(config.objective, learner, guard),
            flips=flips,
            publisher=WeightPublisher(
                resolved_weight_sync(config, device),
                learner,
                parts.pool,
                replicas=replicas,
                token_budget=budget,
                max_model_len=config.rollout.max_model_len,
                tolerance=probe_tolerance(config),
                begins_equal=begins_equal(config),
                colocated=config.cluster.colocated,
                # A step may then have no token of the learner's own version to measure the mismatch on.
                probe_always=config.rollout.steps_ahead > 0,
            ),
            sinks=sinks,
            health=Health(run_dir, sinks),
            sampling=sampling,
            release=lambda: None,
        )
        if checkpoint is not None:
            restore(run, checkpoint)
        run.release = stack.pop_all().close
        return run
