"""The megatron-core learner, for the HF models of `architecture.SUPPORTED`.

It cuts a model by tensor, pipeline, expert and context parallelism. It runs on GPUs with Transformer Engine,
and on CPUs with gloo.
"""
