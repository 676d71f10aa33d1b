"""The megatron-core learner: any HF model of `architecture.SUPPORTED` under tensor, pipeline, expert and context
parallelism, on GPUs with Transformer Engine and on CPUs with gloo."""
