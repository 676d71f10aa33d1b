#!/usr/bin/env bash
# Usage: launch/test.sh [pytest arguments]
#
# Makes the Python environment (minutes, once) and runs the tests; paths count from the root of the repository.
# Without arguments: all of them, quietly. Ends with pytest's own exit status.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests start several processes; with one thread each they share the cores instead of fighting for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
cd "$GSPO_ROOT"
if (($# == 0)); then set -- -q; fi
gspo_exec python -m pytest "$@"
