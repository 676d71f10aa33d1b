"""Verbs that `VllmEngine` adds to vLLM's workers (`worker_extension_cls`) and calls by `collective_rpc`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gspo_dist.rollout.vllm.sampler import KeyedSampler


class WorkerExtension:
    """Mixed into vLLM's worker class, so that `self` is the worker."""

    rank: int
    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any

    def gspo_install(self) -> dict[str, Any]:
        """Puts the sampler in place. Returns the numbers of the layers with routed experts.

        RuntimeError: vLLM runs another model runner than the sampler is written for.
        """
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        if not hasattr(self.model_runner, "input_batch"):
            raise RuntimeError("VllmEngine needs vLLM's model runner V1: unset VLLM_USE_V2_MODEL_RUNNER")
        self.model_runner.sampler = KeyedSampler(self.model_runner)
        layers = [m.layer_id for m in self.model_runner.get_model().modules() if isinstance(m, MoERunner)]
        return {"moe_layers": sorted(layers)}

    def gspo_room(self, slots: int, max_tokens: int, candidates: int) -> None:
        """Makes room for `slots` completions of at most `max_tokens` tokens, with their candidates."""
        self.model_runner.sampler.room(slots, max_tokens, candidates)

    def gspo_read(
        self, slots: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Token ids, log-probs and policy versions [N] at the places of the sampler's buffers.

        None from every worker but the first: all of them sample the same, and one copy is read.
        """
        return None if self.rank else self.model_runner.sampler.read(slots, columns)

    def gspo_read_candidates(
        self, slots: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and log-probs [N, K] of the likeliest tokens at those places. None as in `gspo_read`."""
        return None if self.rank else self.model_runner.sampler.read_candidates(slots, columns)

    def gspo_clear(self) -> None:
        """Empties the sampler's tables: nothing is in the making."""
        self.model_runner.sampler.clear()

    def gspo_policy_version(self, version: int) -> None:
        """Sets the version that is written beside every token from now on."""
        self.model_runner.sampler.policy_version = version

    def gspo_prompt_temperature(self, temperature: float) -> None:
        """Sets the temperature of the log-probs of prompt tokens."""
        self.model_runner.sampler.prompt_temperature = temperature

    def gspo_abandon_update(self) -> None:
        """Ends the open weight update where it stands, so that another can begin."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.abandon()
        self._weight_update_active = False  # vllm 0.30.0 has no verb for it

    def gspo_sync_report(self) -> dict[str, Any]:
        """What the last weight update brought to this worker."""
        return self.weight_transfer_engine.report()
