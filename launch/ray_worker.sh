#!/usr/bin/env bash
# Usage: launch/ray_worker.sh HEAD:PORT [ray start arguments]
#
# Joins the Ray cluster whose head answers at HEAD:PORT with all GPUs of this host, and stays in the foreground.
# Ending this script takes this host out of the cluster. The token must be the head's (launch/ray_head.sh).
#
#   GSPO_DRY_RUN   1: print the command only
set -euo pipefail
if [[ ${1:-} != -h && ${1:-} != --help && ! ${1:-} =~ ^[^:]+:[0-9]+$ ]]; then
    echo "launch/ray_worker.sh needs the head's HEAD:PORT first: got '${1:-}'; see --help" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$GSPO_ROOT/launch/ray.sh"
head=$1
shift
gspo_token find
gspo_ray_start --address "$head" "$@"
