#!/usr/bin/env bash
# Usage: launch/test.sh [quick | pytest arguments]
#
# Makes the Python environment (minutes, once) and runs the tests; paths count from the root of the repository.
#
#   (nothing)  all of them: those that start many processes (`alone`) one at a time, after all others, which run with a
#              process a core (at most eight)
#   quick      those that are not slow, a process a core; pytest arguments may follow
#   ...        pytest with these arguments
#
# Ends with pytest's own exit status, of two runs with the first that is not 0. The tests run the real engines on the
# CPU, on a host with GPUs too, where they have an environment of their own.
set -euo pipefail
if [[ ${GSPO_ACCELERATOR:-cpu} != cpu ]]; then unset GSPO_VENV; fi # that one holds the other lock
export GSPO_ACCELERATOR=cpu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests start several processes; with one thread each they share the cores instead of fighting for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
cd "$GSPO_ROOT"
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which counts OpenMP's threads where these are set
pytest=(python -m pytest -q)
beside=("${pytest[@]}" -n "$((cores < 8 ? cores : 8))")
# A file at a time, as what is slow to make is shared by the tests of a file; in the order of tests/conftest.py.
by_file=(--dist loadfile --no-loadscope-reorder)
case ${1:-} in
"")
    status=0
    (gspo_exec "${beside[@]}" "${by_file[@]}" -m "not alone" tests) || status=$?
    (gspo_exec "${pytest[@]}" -m alone tests/integration) || status=$((status ? status : $?))
    exit $status
    ;;
quick) gspo_exec "${beside[@]}" --dist worksteal -m "not slow" "${@:2}" ;;
*) gspo_exec python -m pytest "$@" ;;
esac
