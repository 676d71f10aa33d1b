"""`gspo upcycle`: a dense model's folder as a mixture of experts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded


def main(args: Sequence[str]) -> None:
    """Writes the folder and says what is in it."""
    parser = argparse.ArgumentParser(
        "gspo upcycle",
        description="Makes a mixture of experts of a dense HF folder (Llama, Mistral, Qwen2, Qwen3): every "
        "feed-forward layer becomes copies of itself behind a router. Without noise it computes what the "
        "dense model computes.",
    )
    parser.add_argument("source", type=Path, help="folder of the dense model")
    parser.add_argument("target", type=Path, help="new or empty folder")
    parser.add_argument("--experts", type=int, required=True, help="experts per layer")
    parser.add_argument("--top-k", type=int, default=2, help="experts that one token meets (default 2)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.02,
        help="of the experts, as a share of each matrix's own spread (default 0.02; 0: all equal)",
    )
    parser.add_argument("--router-std", type=float, default=0.02, help="spread of the routers (default 0.02)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and routers (default 0)")
    parser.add_argument("--family", help="mixtral, qwen2_moe or qwen3_moe (default: what fits the model)")
    parser.add_argument(
        "--check", action="store_true", help="also load both models and print how far their log-probs differ"
    )
    options = parser.parse_args(args)
    guarded(lambda: _upcycle(options))


def _upcycle(options: argparse.Namespace) -> None:
    from gspo_dist.coldstart.upcycle import Upcycling, largest_difference, upcycle

    plan = Upcycling(
        experts=options.experts,
        top_k=options.top_k,
        noise=options.noise,
        router_std=options.router_std,
        seed=options.seed,
        family=options.family,
    )
    source, target = options.source.expanduser(), options.target.expanduser()
    done = upcycle(source, target, plan)
    print(
        f"{target}: {done['layers']} layers of {plan.experts} experts, top-{plan.top_k}, "
        f"{done['parameters'] / 1e6:.1f}M parameters in {done['tensors']} tensors, read back"
    )
    if options.check:
        mean, largest = largest_difference(source, target)
        print(f"log-probs differ from the dense model's by {mean:.1e} nats, at most {largest:.1e}")
