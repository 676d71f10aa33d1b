"""Routing Replay for HF mixture-of-experts models, under plain PyTorch or DeepSpeed ZeRO.

One forward hook per router does both jobs. A hook sees the router's outputs after the engine gathered and
used its weight, and needs only the logits. So ZeRO-3, which partitions weights between calls and has hooks of
its own, does not matter, and gradients flow through the engine's own wrappers of those logits. A replaced
`forward` would have to repeat the linear layer, and is lost when an engine replaces it too. Checkpointed
layers call the module again, so the hook also serves the recomputation.

Which routers: those that choose K experts per token and weigh them by a formula of the router's logits and
the chosen ids. `KINDS` has the formula per router class of transformers. How the choice is made does not
matter here: by a bias, within groups, or by plain scores. `REFUSED` names the classes that work in another
way.

torch.compile ignores hooks that are added after compilation (torch 2.13,
torch._dynamo.config.skip_nnmodule_hook_guards). `RouteFeeder` then raises, because the routes were not used.
Nothing is routed natively in silence. Compile the experts and the attention, not the routers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gspo_dist.routing.hooks import RouterHook, RouterHooks

Weights = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(router, logits [T, E], ids [T, K]) -> gate weights [T, K] by the router's own formula at those experts."""


def _normalised(router: nn.Module, weights: Tensor, epsilon: float) -> Tensor:
    """[T, K] divided by its sum, unless the router's `norm_topk_prob` says no."""
    if getattr(router, "norm_topk_prob", True):
        return weights / (weights.sum(dim=-1, keepdim=True) + epsilon)
    return weights


def _scaled(router: nn.Module, weights: Tensor) -> Tensor:
    """[T, K] times the router's factor, which classes keep under three names."""
    for name in ("routed_scaling_factor", "router_scaling_factor", "route_scale"):
        if hasattr(router, name):
            return weights * getattr(router, name)
    return weights


def _softmax(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The softmax over all experts, gathered at `ids`, and renormalised if `norm_topk_prob`.

    Renormalised it is the softmax over the chosen set: R3 (arXiv 2510.11370) has
    g_i = I_i exp(s_i) / sum_j I_j exp(s_j).
    """
    return _normalised(router, torch.softmax(logits.float(), dim=-1).gather(1, ids), 0.0)


def _softmax_of_chosen(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The softmax over the chosen logits, in their own type."""
    return torch.softmax(logits.gather(1, ids), dim=-1)


def _chosen_by_name(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The function that the config names, over the chosen logits (Cohere 2)."""
    chosen = logits.gather(1, ids)
    if router.expert_selection_fn == "softmax":
        return torch.softmax(chosen, dim=1, dtype=torch.float32)
    return _normalised(router, torch.sigmoid(chosen), 0.0)


def _scaled_softmax(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The softmax over all experts at `ids`, as it is, times a factor (DeepSeek-V2)."""
    return _scaled(router, torch.softmax(logits.float(), dim=-1).gather(1, ids))


def _clamped_softmax(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The softmax over all experts at `ids`, by its sum or `norm_min` if that is larger (Ernie 4.5)."""
    weights = torch.softmax(logits, dim=1, dtype=torch.float32).gather(-1, ids)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=cast(float, router.norm_min))


def _sigmoid(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """Sigmoid scores without the selection bias, renormalised and scaled (DeepSeek-V3)."""
    return _scaled(router, _normalised(router, logits.sigmoid().gather(1, ids), 1e-20))


def _sigmoid_lfm2(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """The same with another guard against a sum of 0."""
    return _scaled(router, _normalised(router, logits.sigmoid().gather(1, ids), 1e-6))


def _plain_sigmoid(router: nn.Module, logits: Tensor, ids: Tensor) -> Tensor:
    """Sigmoid scores in float32 without the selection bias, renormalised."""
    return _normalised(router, torch.sigmoid(logits.float()).gather(1, ids), 0.0)


@dataclass(frozen=True)
class RouterKind:
    """How one router class weighs the chosen experts, and where its outputs are."""

    weights: Weights
    """Its formula. The result is cast to the type of the router's own weights."""
    logits_at: int = 0
    """Place of the logits [T, E] in its output."""
    ids_at: int = 2
    """Place of the ids [T, K]. The weights are the output's second part in every class."""


KINDS: dict[str, RouterKind] = {
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "HunYuanMoEV1Gate",
            "MellumTopKRouter",
            "MiniMaxTopKRouter",
            "MixtralTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ),
        RouterKind(_softmax),
    ),
    **dict.fromkeys(
        (
            "AXK1TopkRouter",
            "AXK2TopkRouter",
            "AfmoeTokenChoiceRouter",
            "DeepseekV32TopkRouter",
            "DeepseekV3TopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4MoeTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV3TopKRouter",
            "HYV4TopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        RouterKind(_sigmoid),
    ),
    **dict.fromkeys(
        ("LagunaTopKRouter", "MiniMaxM2TopKRouter", "MiniMaxM3VLTopKRouter"),
        RouterKind(_plain_sigmoid),
    ),
    **dict.fromkeys(
        (
            "AriaTextTopKRouter",
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSharedTopKRouter",
            "GraniteMoeTopKRouter",
        ),
        RouterKind(_softmax_of_chosen, logits_at=2, ids_at=0),
    ),
    **dict.fromkeys(("GptOssTopKRouter", "GraniteMoeSWATopKRouter"), RouterKind(_softmax_of_chosen)),
    "Cohere2MoeTopKRouter": RouterKind(_chosen_by_name),
    "DeepseekV2TopkRouter": RouterKind(_scaled_softmax),
    "Ernie4_5_MoeTopKRouter": RouterKind(_clamped_softmax),
    "Lfm2MoeTopKRouter": RouterKind(_sigmoid_lfm2),
}
"""Router class of transformers -> how its routes are replayed."""

REFUSED: dict[str, str] = {
    "DeepseekV4HashRouter": "it looks experts up by token id",
    "InklingTopkRouter": "the choice also moves the weights of its shared experts",
    "JetMoeTopKGating": "it returns the order of the tokens within experts, not the experts of the tokens",
    "Llama4Router": "it weighs the experts' inputs by a matrix of scores for all experts",
    "LongcatFlashTopkRouter": "some of its experts are the identity, which engines do not report",
    "NllbMoeTop2Router": "it drops tokens that exceed an expert's capacity",
    "PhimoeTopKRouter": "it masks and samples, so a weight depends on more than the logits of the chosen "
    "experts",
    "SwitchTransformersTop1Router": "it drops tokens that exceed an expert's capacity",
    "ZayaRouter": "it may choose to skip the experts, which its output does not tell from expert 0",
}
"""Router class of transformers -> why its routes cannot be replayed."""


class _TopKHook(RouterHook):
    """The hook on one HF router. It computes the gate weights anew at the replayed experts."""

    def __init__(self, router: nn.Module) -> None:
        self.kind = KINDS[type(router).__name__]
        super().__init__(router)

    def __call__(
        self, router: nn.Module, args: object, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        native = output[self.kind.ids_at]
        ids = self.choose(native)
        for watcher, layer in self.watchers:
            watcher.see(layer, output[self.kind.logits_at], ids)
        if self.replay is None:
            return None
        weights = self.kind.weights(router, output[self.kind.logits_at], ids).to(output[1].dtype)
        replaced = list(output)
        replaced[1], replaced[self.kind.ids_at] = weights, ids
        return tuple(replaced)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> router, in the order of the layers.

    Raises ValueError when there is none, and for any router that cannot be replayed: a replay of the others
    alone would be of another network.
    """
    routers = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in KINDS:
            routers[name] = module
        elif kind in REFUSED or kind.lower().endswith("router"):
            raise ValueError(
                f"routing replay cannot serve {name}, a {kind}: "
                f"{REFUSED.get(kind, 'this class is not among those that were checked')}; set "
                "objective.routing_replay=none and flips.every=0"
            )
    if not routers:
        raise ValueError(
            f"routing replay needs a model with routers of its own: {type(model).__name__} has none, so it "
            "is dense or chooses experts inside its layers; set objective.routing_replay=none and "
            "flips.every=0"
        )
    return routers


def router_size(router: nn.Module) -> tuple[int, int]:
    """(top_k, num_experts) of one router."""
    return cast(int, router.top_k), cast(int, router.num_experts)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether the backward runs this layer's forward again.

    Only the layer counts. The model around it carries the same flag and is not run again.
    """
    return (
        isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
    )


_ROUTERS = RouterHooks(find_routers, _TopKHook, router_size, is_checkpointed)
record, replay, watch = _ROUTERS.record, _ROUTERS.replay, _ROUTERS.watch
