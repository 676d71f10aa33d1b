"""What a run needs before it runs: parameters, memory, time. Pure arithmetic, standard library only."""

from gspo_dist.planner.hardware import GPUS, Gpu, find_gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload, read_run
from gspo_dist.planner.plan import Plan, format_plan, plan
from gspo_dist.planner.throughput import Assumptions, StepTime

__all__ = [
    "GPUS",
    "Assumptions",
    "EngineLayout",
    "Gpu",
    "LearnerLayout",
    "Plan",
    "StepTime",
    "Workload",
    "find_gpu",
    "format_plan",
    "plan",
    "read_run",
]
