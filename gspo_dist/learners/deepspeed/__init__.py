"""The DeepSpeed learner: ZeRO 0 to 3 and AutoEP expert parallelism around the same HF policy as the eager
learner."""
