"""The DeepSpeed learner: ZeRO 0 to 3 and AutoEP expert parallelism around the eager learner's HF policy."""
