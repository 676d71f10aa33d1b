#!/usr/bin/env bash
# Usage: launch/compare_qwen3_30b_a3b.sh --nodes 2|4|8 [--slurm] [--dry-run] [overrides]
#
# GSPO against GRPO with Routing Replay on Qwen3-30B-A3B, on nodes of 8 GPUs with 80 GB: half of the GPUs learn
# (Megatron), half sample (vLLM, 2 GPUs an engine). model.path and data.train must name folders that all nodes see.
#
#   --nodes N   size of the cluster; sets the learner's layout and the number of engines, nothing else
#   --slurm     submit one Slurm job; without it, run on the Ray cluster that this host is the head of
#               (launch/ray_head.sh here, launch/ray_worker.sh on the others)
#   --dry-run   start nothing: print every run of the study and whether it fits (and, with --slurm, the submission)
#
#   launch/compare_qwen3_30b_a3b.sh --nodes 4 --slurm model.path=/shared/Qwen3-30B-A3B data.train=/shared/train.parquet
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
case $nodes in
2) offload=true ;; # 8 ranks: optimiser states would leave 5 GB a GPU
4 | 8) offload=false ;;
*) refuse "--nodes must be 2, 4 or 8: got '$nodes'" ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

study=(
    study=qwen3_30b_a3b
    learner=megatron
    learner.world_size=$((nodes * 4))
    learner.megatron.tensor_parallel=2
    learner.megatron.expert_parallel=8
    learner.megatron.recompute=full
    learner.megatron.optimizer_cpu_offload=$offload
    rollout.engines=$((nodes * 2))
    rollout.tensor_parallel=2
    cluster.plan_gpu=H100
    cluster.plan_nodes="$nodes"
    ${overrides[@]+"${overrides[@]}"}
)
submit=(sbatch --nodes="$nodes" --job-name=gspo-compare "$GSPO_ROOT/launch/slurm.sbatch" compare "${study[@]}")
cd "$GSPO_ROOT"
if ((dry)); then
    if ((slurm)); then gspo_print "${submit[@]}"; fi
    gspo_exec gspo compare "${study[@]}" --dry-run
elif ((slurm)); then
    gspo_exec "${submit[@]}"
else
    gspo_exec gspo compare cluster.address=auto "${study[@]}"
fi
