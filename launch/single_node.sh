#!/usr/bin/env bash
# Usage: launch/single_node.sh [overrides]
#
# One run on this host alone, with a Ray of its own that ends with the run. The experiment and its sizes are overrides,
# and `gspo plan` with the same overrides says beforehand whether it fits.
#
#   launch/single_node.sh learner=megatron learner.world_size=4 rollout.engines=4 model=local model.path=FOLDER
#
#   GSPO_DRY_RUN   1: print the command only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
gspo_exec gspo train cluster.address=null "$@"
