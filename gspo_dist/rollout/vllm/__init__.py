"""vLLM 0.30 behind the rollout engine's protocol.

`engine` is what the rest of the package sees. In its process it uses:

- `arguments`, what vLLM is told of its head and its batch.
- `flights`, the completions in the making.
- `invariant`, products on a CPU that do not depend on the batch.
- `shared_memory`, which lets no end of a process leave memory behind.

The others run inside vLLM's processes, which load them by name:

- `plugin` registers the receivers with vLLM (entry point `vllm.general_plugins`).
- `receivers` takes the buckets of a weight sync in vLLM's workers, whichever transport brings them.
- `experts` loads what `receivers` got of MoE layers.
- `worker` adds our verbs to vLLM's workers, which `engine` calls through `collective_rpc`.
- `sampler` replaces vLLM's sampler there.
"""
