"""What a run needs before it runs: parameters, memory, time. Pure arithmetic, standard library only."""

from gspo_dist.models.shape import BUILT_IN, ModelShape, find_model, model_from_config
from gspo_dist.planner.hardware import GPUS, Gpu, find_gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload, read_run
from gspo_dist.planner.plan import Plan, format_plan, plan
from gspo_dist.planner.throughput import Assumptions, StepTime

__all__ = [
    "BUILT_IN",
    "GPUS",
    "Assumptions",
    "EngineLayout",
    "Gpu",
    "LearnerLayout",
    "ModelShape",
    "Plan",
    "StepTime",
    "Workload",
    "find_gpu",
    "find_model",
    "format_plan",
    "model_from_config",
    "plan",
    "read_run",
]
