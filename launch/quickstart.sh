#!/usr/bin/env bash
# Usage: launch/quickstart.sh [overrides]
#
# Makes the Python environment (minutes, once) and trains the quickstart: a small Mixture-of-Experts policy with GSPO,
# on this host, GPU or not. Overrides are hydra's, e.g. launch/quickstart.sh steps=20 seed=1. `gspo train --help`
# lists them. Two ranks learn and two engines sample; on one GPU, one of each take turns on it, and on two or three, one
# of each has a GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
layout=()
if [[ $(gspo_choose_accelerator) == gpu && " $* " != *" cluster.device=cpu "* ]]; then
    gpus=$(gspo_count_gpus)
    if ((gpus < 4)); then layout=(learner.world_size=1 learner.deepspeed.expert_parallel=1 rollout.engines=1); fi
    if ((gpus == 1)); then layout+=(cluster.colocated=true); fi
fi
gspo_exec gspo train experiment=quickstart ${layout[@]+"${layout[@]}"} "$@"
