#!/usr/bin/env bash
# Usage: tests/integration/install_hosts.sh
#
# Installs what the tests of several hosts need on Debian or Ubuntu, as root: network tools and Slurm. bubblewrap comes
# along, which the tests of the sandbox need: where hosts can be made, it works too.
# Ends with status 1, and the reason, where it cannot.
set -euo pipefail
missing=()
for tool in ip nsenter unshare setpriv bwrap slurmctld slurmd sbatch munged; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
refuse() {
    echo "tests of several hosts are skipped: $*" >&2
    exit 1
}
# A container may lack the right to make hosts, whatever is installed.
check_rights() {
    unshare --net --mount --uts --pid --fork true 2>/dev/null || refuse "namespaces cannot be made here"
    ip link add gspo-try type bridge 2>/dev/null || refuse "a network bridge cannot be made here"
    ip link delete gspo-try
}
if ((${#missing[@]} == 0)); then
    check_rights
    exit 0
fi
((EUID == 0)) || refuse "${missing[*]} not found, and only root may install packages"
command -v apt-get >/dev/null || refuse "${missing[*]} not found, and there is no apt-get (the packages are iproute2, util-linux, bubblewrap, slurm-wlm, munge)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || refuse "apt-get update failed"
apt-get install -y -qq --no-install-recommends iproute2 util-linux bubblewrap slurm-wlm munge >/dev/null ||
    refuse "apt-get install failed"
check_rights
