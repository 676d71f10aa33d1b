#!/usr/bin/env bash
# Usage: launch/quickstart.sh [overrides]
#
# Makes the Python environment (minutes, once) and trains the quickstart: a small Mixture-of-Experts policy with GSPO,
# on this host, GPU or not. Overrides are hydra's, e.g. launch/quickstart.sh steps=20 seed=1. conf/README.md explains
# them, and `gspo train --help` lists the groups.
#
# Two ranks learn and two engines sample. On two or three GPUs, one rank and one engine have a GPU each. On one GPU, one
# of each take turns on it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
layout=()
if [[ $(gspo_choose_accelerator) == gpu && " $* " != *" cluster.device=cpu "* ]]; then
    gpus=$(gspo_count_gpus)
    if ((gpus < 4)); then layout=(learner.world_size=1 learner.deepspeed.expert_parallel=1 rollout.engines=1); fi
    if ((gpus == 1)); then layout+=(cluster.colocated=true); fi
fi
gspo_exec gspo train experiment=quickstart ${layout[@]+"${layout[@]}"} "$@"
