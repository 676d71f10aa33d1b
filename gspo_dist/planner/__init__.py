"""What a run needs before it runs: parameters, memory, time. Pure arithmetic on its configuration."""

from gspo_dist.planner.hardware import GPUS, Gpu, find_gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload, read_run
from gspo_dist.planner.plan import Plan, plan
from gspo_dist.planner.text import format_plan
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
