#!/usr/bin/env bash
# Usage: tests/integration/install_hosts.sh
#
# Installs what the tests of several hosts need on Debian or Ubuntu, as root: network tools and Slurm.
# Ends with status 1, and the reason, where it cannot.
set -euo pipefail
missing=()
for tool in ip nsenter unshare setpriv slurmctld slurmd sbatch munged; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]} == 0)); then exit 0; fi
refuse() {
    echo "tests of several hosts are skipped: ${missing[*]} not found, and $*" >&2
    exit 1
}
((EUID == 0)) || refuse "only root may install packages"
command -v apt-get >/dev/null || refuse "there is no apt-get (the packages are iproute2, util-linux, slurm-wlm, munge)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || refuse "apt-get update failed"
apt-get install -y -qq --no-install-recommends iproute2 util-linux slurm-wlm munge >/dev/null ||
    refuse "apt-get install failed"
