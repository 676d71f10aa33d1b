"""The DeepSpeed learner: ZeRO 0 to 3 and AutoEP expert parallelism around the eager learner's HF policy."""

from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner

__all__ = ["DeepSpeedLearner"]
