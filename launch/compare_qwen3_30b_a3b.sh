#!/usr/bin/env bash
# Usage: launch/compare_qwen3_30b_a3b.sh --nodes 2|4|8 [--slurm] [--dry-run] [overrides]
#
# GSPO against GRPO with Routing Replay on Qwen3-30B-A3B-Base (conf/study/qwen3_30b_a3b.yaml), on nodes of 8 GPUs with
# 80 GB. Half of the GPUs learn with Megatron, which needs Transformer Engine beside the GPU lock (docker/Dockerfile.gpu).
# The other half sample with vLLM. The arms run one after the other.
#
# These must be given, on a file system that all nodes see: model.path (an HF folder), data.train and data.heldout
# (.jsonl or .parquet). The runs go to study.dir (default runs/qwen3_30b_a3b).
#
#   --nodes N   size of the cluster: takes conf/layout/qwen3_30b_a3b_Nx8.yaml
#   --slurm     submit one Slurm job. Without it, run on the Ray cluster that this host is the head of
#               (launch/ray_head.sh here, launch/ray_worker.sh on the others)
#   --dry-run   start nothing: print every arm, its memory and whether it fits (and, with --slurm, the submission)
#
# A study that is submitted again goes on where it stopped. It also tries again what died, unless
# study.retry_failed=false. Verdicts need two seeds or more: study.seeds=[0,1,2].
#
#   launch/compare_qwen3_30b_a3b.sh --nodes 4 --slurm model.path=/shared/model data.train=/shared/train.parquet \
#       data.heldout=/shared/aime24.jsonl study.dir=/shared/runs
#
#   GSPO_DRY_RUN   1: print the commands only
set -euo pipefail
refuse() {
    echo "launch/compare_qwen3_30b_a3b.sh: $*; see --help" >&2
    exit 2
}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then source "$(dirname "${BASH_SOURCE[0]}")/env.sh"; fi
nodes="" slurm=0 dry=0 overrides=()
while (($#)); do
    case $1 in
    --nodes)
        nodes=${2:-}
        shift
        ;;
    --nodes=*) nodes=${1#*=} ;;
    --slurm) slurm=1 ;;
    --dry-run) dry=1 ;;
    -*) refuse "unknown option $1" ;;
    *) overrides+=("$1") ;;
    esac
    (($# == 0)) || shift
done
[[ $nodes =~ ^(2|4|8)$ ]] || refuse "--nodes must be 2, 4 or 8: got '$nodes'"
if ((!dry)) && [[ ${GSPO_DRY_RUN:-0} != 1 ]]; then # before minutes of installation, or hours in a queue
    for key in model.path data.train data.heldout; do
        [[ " ${overrides[*]-} " == *" $key="* ]] || refuse "$key=... must be given"
    done
fi
# A login node may have no GPU, and another lock than the job's: the job makes the environment, on its first node.
if ((slurm && !dry)); then GSPO_INSTALL=0; fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

study=(study=qwen3_30b_a3b layout="qwen3_30b_a3b_${nodes}x8" ${overrides[@]+"${overrides[@]}"})
submit=(sbatch --nodes="$nodes" --job-name=gspo-compare "$GSPO_ROOT/launch/slurm.sbatch" compare "${study[@]}")
cd "$GSPO_ROOT"
if ((dry)); then
    if ((slurm)); then gspo_print "${submit[@]}"; fi
    gspo_exec gspo compare "${study[@]}" --dry-run
elif ((slurm)); then
    gspo_exec "${submit[@]}"
else
    gspo_exec gspo compare cluster.address=auto cluster.nodes="$nodes" "${study[@]}"
fi
