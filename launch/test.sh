#!/usr/bin/env bash
# Usage: launch/test.sh [pytest arguments]
#
# Makes the Python environment (minutes, once) and runs the tests; paths count from the root of the repository.
# Without arguments: all of them, quietly. Ends with pytest's own exit status. The tests run the real engines on the CPU,
# on a host with GPUs too, where they have an environment of their own.
set -euo pipefail
if [[ ${GSPO_ACCELERATOR:-cpu} != cpu ]]; then unset GSPO_VENV; fi # that one holds the other lock
export GSPO_ACCELERATOR=cpu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests start several processes; with one thread each they share the cores instead of fighting for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
cd "$GSPO_ROOT"
if (($# == 0)); then set -- -q; fi
gspo_exec python -m pytest "$@"
