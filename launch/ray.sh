# Sourced after env.sh by the launchers that start Ray: its token, its environment and its object store.
#
#   RAY_AUTH_MODE        token (default): who has no token is refused. disabled: everybody can run code in the cluster
#   RAY_AUTH_TOKEN_PATH  file with the token (default: ~/.ray/auth_token)
#   RAY_AUTH_TOKEN       the token itself, instead of a file
#
# Ray 2.60 asks for a token wherever one lies in the home folder of whoever starts the head, and then neither a worker
# nor `ray status` nor a driver sends it, unless RAY_AUTH_MODE says so. So it is said everywhere.

gspo_random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# gspo_token make|find|job: Ray's token for what this shell starts. A head makes the file where there is none; a worker
# must find it; a Slurm job has a token of its own that srun hands to its steps.
gspo_token() {
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    if [[ $RAY_AUTH_MODE != token ]]; then
        gspo_say "RAY_AUTH_MODE=$RAY_AUTH_MODE: everybody who reaches this host can run code in its cluster"
        return
    fi
    if [[ $GSPO_DRY_RUN == 1 || -n ${RAY_AUTH_TOKEN:-} ]]; then return; fi
    local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [[ $1 == job && -z ${RAY_AUTH_TOKEN_PATH:-} ]]; then
        RAY_AUTH_TOKEN=$(gspo_random)
        export RAY_AUTH_TOKEN
        return
    fi
    if [[ $1 == make && ! -s $file ]]; then
        # Written whole under another name, then linked, so that nobody reads half a token or replaces another's.
        (
            umask 077
            mkdir -p "$(dirname "$file")"
            gspo_random >"$file.$$"
            ln "$file.$$" "$file" 2>/dev/null || [[ -s $file ]]
            rm -f "$file.$$"
        ) || gspo_die "the cluster's token cannot be written to $file: set RAY_AUTH_TOKEN_PATH to another file"
    fi
    if [[ ! -s $file ]]; then
        gspo_die "the cluster has a token, and $file is not on this host: share the home folder, copy the file" \
            "from the head, or set RAY_AUTH_TOKEN_PATH"
    fi
    chmod go= "$file" 2>/dev/null || true
}

# Bytes of the object store: 30% of the memory, as Ray takes, but at most half of /dev/shm, whose other half NCCL and
# the weight sync need, and at most 100 GiB. With routing replay a step's rollouts need the most of it.
gspo_store_bytes() {
    local memory_kib shm_kib kib
    memory_kib=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo)
    shm_kib=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }')
    kib=$((memory_kib * 3 / 10))
    if ((kib > ${shm_kib:-0} / 2)); then kib=$((${shm_kib:-0} / 2)); fi
    if ((kib > 100 * 1024 * 1024)); then kib=$((100 * 1024 * 1024)); fi
    if ((kib < 80 * 1024)); then kib=$((80 * 1024)); fi # Ray's smallest is 75 MiB
    echo $((kib * 1024))
}

# gspo_ray_start ARGUMENTS...: becomes `ray start` with what every node of a cluster needs. Arguments of the user come
# last and win.
gspo_ray_start() {
    # Ray 2.60 runs workers at nice 15, behind anything else on the host. It reads these where a node starts.
    export RAY_worker_niceness=${RAY_worker_niceness:-0}
    export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}
    gspo_exec ray start --disable-usage-stats --block --object-store-memory "$(gspo_store_bytes)" "$@"
}
