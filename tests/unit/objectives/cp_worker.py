"""One rank of a real context-parallel group: holds a part of every sequence, saves its share of the loss.

Arguments: rank, world size, rendezvous file, input file (torch.save of a dict), output file.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from gspo_dist.objectives import Denominators, Segments, get_objective


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    data = torch.load(sys.argv[4])
    mine = data["owner"] == rank
    out = {}
    for name in data["objectives"]:
        lp = data["logprobs"][mine].clone().requires_grad_()
        segments = Segments(data["ids"][mine], data["count"], SumOverRanks.apply)
        denominators = Denominators(data["count"], data["ids"].numel(), 64)
        result = get_objective(name).loss(
            lp,
            data["old"][mine],
            data["advantages"][mine],
            segments,
            denominators,
            offset=data["offset"],
            extra={k: x[mine] if isinstance(x, torch.Tensor) else x for k, x in data["extra"][name].items()},
        )
        result.loss.backward()
        out[name] = {"loss": result.loss.detach(), "grad": lp.grad, "stats": result.stats}
    torch.save(out, sys.argv[5])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
