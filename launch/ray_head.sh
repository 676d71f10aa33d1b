#!/usr/bin/env bash
# Usage: launch/ray_head.sh [ray start arguments]
#
# Starts the head of a Ray cluster on this host and stays in the foreground. Ending this script ends the head.
# Then, on every other host: launch/ray_worker.sh HEAD:6379. Then, on this one, in another shell:
#   source launch/env.sh && gspo train cluster=ray [overrides]
#
# The cluster has a token: the file ~/.ray/auth_token, made here where there is none. Hosts that do not share the home
# folder need a copy of it, or RAY_AUTH_TOKEN_PATH.
#
#   GSPO_RAY_PORT  port of the cluster (default 6379)
#   GSPO_DRY_RUN   1: print the command only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$GSPO_ROOT/launch/ray.sh"
gspo_token make
gspo_ray_start --head --port "${GSPO_RAY_PORT:-6379}" "$@"
