"""A whole run, and what its sections must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_dist.checks import at_least, divisors, nearest
from gspo_dist.config.checkpoint import CheckpointConfig
from gspo_dist.config.cluster import ClusterConfig
from gspo_dist.config.consistency import check_consistency
from gspo_dist.config.data import DataConfig
from gspo_dist.config.environment import EnvironmentConfig
from gspo_dist.config.evaluation import EvaluationConfig
from gspo_dist.config.flips import FlipsConfig
from gspo_dist.config.learner import LearnerConfig
from gspo_dist.config.logger import LoggerConfig
from gspo_dist.config.mapping import described, knobs
from gspo_dist.config.model import ModelConfig
from gspo_dist.config.objective import ObjectiveConfig
from gspo_dist.config.plan import PlanConfig
from gspo_dist.config.profile import ProfileConfig
from gspo_dist.config.reward import RewardConfig
from gspo_dist.config.rollout import RolloutConfig


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run_dir: str = "runs/default"
    """Folder of everything that the run writes."""
    seed: int = 0
    """Every random choice of the run derives from it."""
    steps: int = 100
    """Each step collects prompts_per_step x group_size rollouts and makes `mini_batches` optimiser steps."""
    mini_batches: int = 4
    """Optimiser steps per rollout batch (the paper: 4)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy to start from."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The process group that owns the trainable weights."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout engines and what they sample."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss, the advantages, and where old log-probs come from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and held-out prompts."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How a completion is judged."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What answers the policy between its turns."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where processes run."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """What is shown and kept."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out accuracy before, during and after training."""
    flips: FlipsConfig = field(default_factory=FlipsConfig)
    """Live rates of routing flips."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Steps in which the learner is profiled."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What `gspo plan` assumes. The run itself reads none of it."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("mini_batches", self.mini_batches, 1)
        self._check_batches()
        self._check_precisions()
        self._check_in_process()
        self._check_ahead()
        self._check_selection()
        self._check_environment()
        self._check_accepted()
        self._check_profile()
        check_consistency(self.learner, self.rollout)

    def _check_batches(self) -> None:
        if self.rollout.prompts_per_step % self.mini_batches:
            raise ValueError(
                "mini_batches must divide rollout.prompts_per_step (groups are kept whole): got "
                f"{self.mini_batches} and {self.rollout.prompts_per_step}; try "
                f"{divisors(self.rollout.prompts_per_step)}"
            )
        rollouts = self.rollout.rollouts_per_step // self.mini_batches
        if rollouts < self.learner.data_parallel:
            raise ValueError(
                f"a mini-batch must give every data-parallel replica a rollout: got {rollouts} rollouts for "
                f"{self.learner.data_parallel} replicas; raise rollout.prompts_per_step or lower mini_batches"
            )
        budgets = {
            "token_budget": self.learner.token_budget,
            "forward_token_budget": self.learner.forward_budget,
        }
        for name, budget in budgets.items():
            if budget < self.rollout.max_model_len:
                raise ValueError(
                    f"learner.{name} must hold the longest sequence (sequences are never cut): got {budget} "
                    "for rollout.max_prompt_tokens + rollout.max_completion_tokens = "
                    f"{self.rollout.max_model_len}; raise the budget or shorten the sequences"
                )
        advantage = self.objective.advantage_name
        if self.rollout.group_size == 1 and advantage not in ("none", None):
            raise ValueError(
                f"rollout.group_size must be at least 2 for {advantage} advantages (a group of one has no "
                "baseline): got 1; raise it or set objective.advantage=none"
            )

    def _check_precisions(self) -> None:
        both = {self.learner.precision, self.rollout.precision}
        if self.rollout.engine == "vllm" and both == {"bf16", "fp16"}:
            raise ValueError(
                "fp16 and bf16 each round away what the other keeps, so engine and learner would differ more "
                f"than in either: got learner.precision={self.learner.precision} and rollout.precision="
                f"{self.rollout.precision}; give both one value, or one of them fp32"
            )

    def _check_in_process(self) -> None:
        if not self.cluster.in_process:
            return
        if self.rollout.engines != 1:
            raise ValueError(
                "cluster.in_process runs one engine in this process: got rollout.engines "
                f"{self.rollout.engines}; set it to 1"
            )
        if self.learner.backend != "eager":
            raise ValueError(
                f"cluster.in_process needs learner.backend eager: got {self.learner.backend}; "
                "unset one of them"
            )

    def _check_ahead(self) -> None:
        if self.cluster.colocated and self.rollout.ticks_per_step:
            raise ValueError(
                "rollout.ticks_per_step must be 0 or null with cluster.colocated: got "
                f"{self.rollout.ticks_per_step}, and colocated engines sleep while the learner works; set it "
                "to 0 for a run that repeats itself"
            )

    def _check_environment(self) -> None:
        if not self.environment.is_on:
            if self.objective.credit == "turn":
                raise ValueError(
                    "objective.credit=turn needs an environment, whose turns are paid: got none; set "
                    "environment.factory or environment.tools, or leave credit at episode"
                )
            return
        if self.rollout.replay_ticks is not None:
            raise ValueError(
                "rollout.replay_ticks repeats what engines did, and not when an environment answered: got "
                f"{self.rollout.replay_ticks!r} with an environment; use rollout.ticks_per_step, under which "
                "a run with an environment repeats itself"
            )

    def _check_selection(self) -> None:
        degenerate = self.objective.selection.degenerate
        if degenerate != "keep" and self.rollout.group_size == 1:
            raise ValueError(
                f"objective.selection.degenerate={degenerate} leaves out groups whose rewards are all equal, "
                "as every group of one is: got rollout.group_size 1; raise it, or set degenerate=keep"
            )

    def _check_profile(self) -> None:
        if not self.profile.steps:
            return
        for name, values, last, knob in (
            ("steps", self.profile.steps, self.steps, "steps"),
            ("ranks", self.profile.ranks, self.learner.world_size - 1, "learner.world_size"),
        ):
            if any(value > last for value in values):
                raise ValueError(
                    f"profile.{name} must be among the run's own (up to {last}, by {knob}): got "
                    f"{list(values)}; leave {max(values)} out"
                )

    def _check_accepted(self) -> None:
        # Here and not in CheckpointConfig, because only a whole run knows every knob.
        known = knobs(RunConfig)
        open_ended = [knob for knob, kind in known.items() if described(kind) == "a mapping"]
        for key in self.checkpoint.accept:
            if key not in known and not any(key.startswith(f"{knob}.") for knob in open_ended):
                raise ValueError(
                    f"checkpoint.accept must hold knobs or sections of a run: got {key!r}; "
                    f"{nearest(key, known)}"
                )
