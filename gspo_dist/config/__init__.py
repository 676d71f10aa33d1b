"""Every knob of a run, documented where it is defined: frozen dataclasses with checks, one file per section.

    run.py        RunConfig: a whole run, and what its sections must agree on
    model.py      the policy to start from
    learner.py    the learner, its optimiser, DeepSpeed, Megatron
    rollout.py    the engines, sampling, the weight sync
    objective.py  the loss, the advantages, the correction (the guard's knobs are in objectives/offset.py)
    selection.py  which rollouts of a batch train
    data.py, reward.py, environment.py, evaluation.py, cluster.py, logger.py, checkpoint.py, flips.py
    profile.py    steps in which the learner is profiled
    plan.py       what `gspo plan` assumes
    mapping.py    a config from plain mappings, and back

Nothing here imports torch or omegaconf, so that `gspo --help`, `gspo plan` and a test of a config answer at
once. The hydra schema is derived from these classes (cli/compose.py), and a run only ever sees a checked,
frozen `RunConfig`. Errors are `ValueError`: the rule, what was got, the way out.
"""

from gspo_dist.config.checkpoint import CheckpointConfig
from gspo_dist.config.cluster import ClusterConfig
from gspo_dist.config.data import DataConfig, RenewalConfig
from gspo_dist.config.environment import EnvironmentConfig
from gspo_dist.config.evaluation import EvaluationConfig
from gspo_dist.config.flips import FlipsConfig
from gspo_dist.config.learner import DeepSpeedConfig, LearnerConfig, MegatronConfig, OptimizerConfig
from gspo_dist.config.logger import LoggerConfig, WandbConfig
from gspo_dist.config.model import ModelConfig
from gspo_dist.config.objective import CorrectionConfig, ObjectiveConfig
from gspo_dist.config.plan import PlanConfig
from gspo_dist.config.profile import ProfileConfig
from gspo_dist.config.reward import RewardConfig
from gspo_dist.config.rollout import RolloutConfig, WeightSyncConfig
from gspo_dist.config.run import RunConfig
from gspo_dist.config.selection import SelectionConfig
from gspo_dist.objectives.offset import GuardConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "CorrectionConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FlipsConfig",
    "GuardConfig",
    "LearnerConfig",
    "LoggerConfig",
    "MegatronConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ProfileConfig",
    "RenewalConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SelectionConfig",
    "WandbConfig",
    "WeightSyncConfig",
]
