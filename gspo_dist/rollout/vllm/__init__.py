"""vLLM 0.30 behind the rollout engine's protocol.

`engine` is what the rest of the package sees. The other four run inside vLLM's processes, which load
them by name:

- `plugin` registers the receivers with vLLM (entry point `vllm.general_plugins`).
- `receivers` take the buckets of a weight sync in vLLM's workers, one class per transport.
- `worker` adds our verbs to vLLM's workers, which `engine` calls through `collective_rpc`.
- `sampler` replaces vLLM's sampler there.
"""
