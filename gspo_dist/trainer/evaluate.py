"""Evaluating a model without a learner: on held-out prompts, or on benchmark suites."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.data.prompts import load_prompts
from gspo_dist.evaluation.bench import run_suites
from gspo_dist.evaluation.problem import Suite, SuiteResult
from gspo_dist.evaluation.runner import evaluate_heldout
from gspo_dist.evaluation.samplers import EndpointSampler, EngineSampler, Sampler, SuitePrompts
from gspo_dist.evaluation.tasks.table import load_suites
from gspo_dist.files import write_text
from gspo_dist.metrics.sinks import going_on_without
from gspo_dist.metrics.wandb_sink import Mode, choose_mode, open_wandb
from gspo_dist.rewards.pool import LocalRewardPool, RewardPool
from gspo_dist.rollout.pool import LocalRolloutPool, RolloutPool
from gspo_dist.trainer.episodes import EpisodeJudge, play
from gspo_dist.trainer.setup.checks import check_model, load_tokenizer, resolve_device
from gspo_dist.trainer.setup.environment import check_environment, judged_heldout, start_episodes
from gspo_dist.trainer.setup.factories import engine_factory, sampling_spec
from gspo_dist.trainer.setup.processes import Processes
from gspo_dist.types import Completion, Prompt, SamplingSpec

FOLDER = "evaluation"
"""Of the run folder: what suites leave."""
SUITE_IDS = 1 << 41
"""Request ids of suites start here: neither training nor held-out prompts count this far."""
TELL_EVERY_S = 10.0
FAILURES_SENT = 500
"""Completions in the table that W&B gets."""

Tell = Callable[[str], None]


def without_learner(config: RunConfig) -> RunConfig:
    """The configuration of engines alone."""
    return replace(
        config,
        flips=replace(config.flips, every=0),
        objective=replace(config.objective, routing_replay="none"),
        cluster=replace(config.cluster, colocated=False),
    )


def evaluate_model(config: RunConfig) -> dict[str, float]:
    """Held-out metrics of `model.path` with the configured engines, rewards and evaluation.

    Nothing is trained. Raises ValueError without held-out prompts, and where an endpoint is asked for.
    """
    if config.evaluation.endpoint is not None:
        raise ValueError(
            f"evaluation.endpoint answers suites alone: got {config.evaluation.endpoint} and no suite; name "
            "some, such as suite=aime24, or unset it"
        )
    if config.data.heldout is None:
        raise ValueError("evaluate needs held-out prompts: set data.heldout to a file or a task")
    config = without_learner(config)
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    environment = check_environment(config, tokenizer)
    heldout = load_prompts(
        config.data,
        "heldout",
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.seed,
        **(environment.rendering if environment else {}),
    )
    prompts = judged_heldout(config, heldout)[: config.evaluation.prompts]
    with contextlib.ExitStack() as stack:
        pool, make_rewards = stack.enter_context(engines(config, model, moe_layers))
        rewards = make_rewards()
        rewards.start()
        episodes = start_episodes(config, environment)
        if episodes is not None:
            stack.callback(episodes.pool.close)
        spec = replace(
            sampling_spec(config, tokenizer, pool.start()),
            n=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
        )

        def generate(chosen: Sequence[Prompt], asked: SamplingSpec) -> list[list[Completion]]:
            if episodes is None:
                return pool.generate(chosen, asked, range(len(chosen)))
            return play(pool, episodes, chosen, asked, range(len(chosen)))

        judges = rewards if episodes is None else EpisodeJudge(episodes, rewards)
        return evaluate_heldout(generate, judges, prompts, spec)


def evaluate_suites(config: RunConfig, tell: Tell = lambda line: None) -> list[SuiteResult]:
    """The results of `evaluation.suites`, sampled by a model's engines or by `evaluation.endpoint`.

    Results lie in `run_dir/evaluation/SUITE`; an interrupted call goes on where it stopped. tell: gets a line
    now and then. Raises ValueError for bad input before anything starts, and what samplers and graders raise.
    """
    folder = Path(config.run_dir).expanduser().resolve() / FOLDER
    with contextlib.ExitStack() as stack:
        suites = load_suites(config.evaluation, config.data.root, config.cluster.env)
        for suite in suites:
            stack.callback(suite.grader.close)
        mode = choose_mode(config.logger.wandb)
        sampler, setting = stack.enter_context(_sampler(config, suites))
        results = list(_told(run_suites(suites, sampler, folder, setting), tell))
    with going_on_without("W&B"):
        _to_wandb(config, folder, mode, results)
    return results


def _told(steps: Iterator[tuple[Suite, int, SuiteResult | None]], tell: Tell) -> Iterator[SuiteResult]:
    told = time.monotonic()
    for suite, graded, result in steps:
        if result is not None:
            yield result
        elif time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            tell(f"{suite.name}: {graded} of {len(suite.problems) * suite.samples} samples graded")


@contextlib.contextmanager
def _sampler(config: RunConfig, suites: Sequence[Suite]) -> Iterator[tuple[Sampler, dict[str, Any]]]:
    """(what answers, what of it must be equal for samples to belong together)."""
    evaluation = config.evaluation
    if evaluation.endpoint is not None:
        longest = config.rollout.max_completion_tokens
        endpoint = EndpointSampler(
            evaluation.endpoint,
            evaluation.endpoint_model,
            max_tokens=longest,
            seed=config.seed,
            concurrency=evaluation.endpoint_concurrency,
        )
        yield endpoint, {"model": endpoint.name, "seed": config.seed, "longest": longest}
        return
    config = without_learner(config)
    model = str(ensure_model(config.model))
    moe_layers = check_model(config, model)
    tokenizer = load_tokenizer(model)
    prompts = suite_prompts(config, tokenizer)
    prompts.check(suites)
    with engines(config, model, moe_layers) as (pool, _):
        spec = replace(sampling_spec(config, tokenizer, pool.start()), seed=config.seed + 1)
        sampler = EngineSampler(pool, prompts, spec, name=model, first_id=SUITE_IDS)
        yield sampler, {**model_setting(config, model), "weights": weights_of(Path(model))}


def suite_prompts(config: RunConfig, tokenizer: Any) -> SuitePrompts:
    """What renders the problems of a run's suites."""
    return SuitePrompts(
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        template_args=config.data.template_args,
        too_long=config.data.too_long,
    )


def model_setting(config: RunConfig, model: str) -> dict[str, Any]:
    """What of a run must be equal for samples to belong together."""
    return {
        "model": model,
        "seed": config.seed,
        "longest": config.rollout.max_completion_tokens,
        "longest_prompt": config.rollout.max_prompt_tokens,
        "template_args": dict(config.data.template_args),
    }


def weights_of(folder: Path) -> list[list[Any]]:
    """Name, size and time of each file of weights: another model in the same place is not this one."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextlib.contextmanager
def engines(
    config: RunConfig, model: str, moe_layers: int
) -> Iterator[tuple[RolloutPool, Callable[[], RewardPool]]]:
    """(the engines of a configuration, what makes its reward workers), in this process or as actors.

    `start` waits for either. Leaving the block ends both.
    """
    device = resolve_device(config.cluster)
    if config.cluster.in_process:
        with contextlib.ExitStack() as stack:
            engine = engine_factory(config, model, device, moe_layers)(name="engine-0")
            pool = stack.enter_context(contextlib.closing(LocalRolloutPool(engine)))
            yield (
                pool,
                lambda: stack.enter_context(
                    contextlib.closing(LocalRewardPool(config.reward, config.cluster.env))
                ),
            )
        return
    run_dir = Path(config.run_dir).expanduser().resolve()
    with Processes(config, model, device, run_dir, moe_layers, learners=False) as processes:
        yield processes.pool(), processes.rewards


def _to_wandb(config: RunConfig, folder: Path, mode: Mode | None, results: Sequence[SuiteResult]) -> None:
    """One W&B run for the folder: the figures, and completions that failed as a table."""
    if mode is None:
        return
    identity = folder / "wandb_id"
    if not identity.is_file():
        write_text(identity, f"eval-{uuid.uuid4().hex[:12]}")
    name = identity.read_text(encoding="utf-8")
    sink = open_wandb(mode, config.logger.wandb, folder, to_mapping(config), name)
    if sink is None:
        return
    figures = {key: value for result in results for key, value in result.logged().items()}
    columns = ("problem", "sample", "why", "answer", "completion", "tokens")
    failed = [
        {"suite": result.suite, **{name: sample[name] for name in columns}}
        for result in results
        for sample in result.samples
        if not sample["correct"]
    ]
    sink.samples(0, failed[:FAILURES_SENT])
    sink.log(0, figures)
    sink.close({})
