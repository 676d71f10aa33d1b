#!/usr/bin/env bash
# Usage: launch/quickstart.sh [overrides]
#
# Makes the Python environment (minutes, once) and trains the quickstart: a small Mixture-of-Experts policy with GSPO,
# on this host, GPU or not. Overrides are hydra's, e.g. launch/quickstart.sh steps=20 seed=1. `gspo train --help`
# lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
gspo_exec gspo train experiment=quickstart "$@"
