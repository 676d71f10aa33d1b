#!/usr/bin/env bash
# Usage: launch/test.sh [quick | slow | pytest arguments]
#
# Makes the Python environment (minutes, once) and runs the tests; paths count from the root of the repository.
#
#   quick      the unit tests, a process a core (at most eight)
#   slow       real engines, Ray and several processes, one test at a time: they share the cores already
#   (nothing)  both, one after the other, whatever the first finds
#   ...        pytest with these arguments; they may follow `quick` and `slow` too
#
# Ends with pytest's own exit status, of both runs with the first that is not 0. The tests run the real engines on the
# CPU, on a host with GPUs too, where they have an environment of their own.
set -euo pipefail
if [[ ${GSPO_ACCELERATOR:-cpu} != cpu ]]; then unset GSPO_VENV; fi # that one holds the other lock
export GSPO_ACCELERATOR=cpu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests start several processes; with one thread each they share the cores instead of fighting for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
cd "$GSPO_ROOT"
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which counts OpenMP's threads where these are set
quick=(python -m pytest -q -m "not slow" -n "$((cores < 8 ? cores : 8))" --dist worksteal)
slow=(python -m pytest -q -m slow)
case ${1:-} in
quick) run=("${quick[@]}" "${@:2}") ;;
slow) run=("${slow[@]}" "${@:2}") ;;
*) run=(python -m pytest "$@") ;;
esac
if (($#)); then
    gspo_exec "${run[@]}"
    exit
fi
status=0
(gspo_exec "${quick[@]}") || status=$?
(gspo_exec "${slow[@]}") || status=$((status ? status : $?))
exit $status
