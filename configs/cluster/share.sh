#!/usr/bin/env bash
# Shares a folder of one machine with others over NFS, for the run folder of a job on several machines. Needs sudo
# without a password, and Debian or Ubuntu. Doing it again changes nothing.
#
#   bash configs/cluster/share.sh serve FOLDER ADDRESS...    on the machine that has the disk
#   bash configs/cluster/share.sh mount ADDRESS FOLDER       on the others, to the same path; waits for the first
set -euo pipefail

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d' >&2
    exit 2
}

[ $# -ge 3 ] || [ "${1:-}:$#" = serve:2 ] || usage

# need PACKAGE COMMAND: install what lacks
need() {
    if ! sudo sh -c "command -v $2" >/dev/null; then
        sudo apt-get update -qq
        sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1"
    fi
}

serve() {
    local folder=$1 address line=''
    shift
    need nfs-kernel-server exportfs
    sudo mkdir -p "$folder"
    sudo chown "$(id -u):$(id -g)" "$folder"
    # sync: what a rank has synced is on the disk, as checkpoints need it
    for address in "$@"; do line+=" $address(rw,sync,no_subtree_check)"; done
    if [ -n "$line" ]; then
        sudo mkdir -p /etc/exports.d
        echo "\"$folder\"$line" | sudo tee /etc/exports.d/quintet.exports >/dev/null
        sudo exportfs -ra
    fi
    echo "$folder is shared with: $*"
}

mount_from() {
    local address=$1 folder=$2 tries=0
    need nfs-common mount.nfs
    sudo mkdir -p "$folder"
    until mountpoint -q "$folder"; do
        # hard: a server that is away for a while stops the ranks, and never hands them an error in the middle of a file
        if ! sudo mount -t nfs -o vers=4.2,hard,nosuid,nodev "$address:$folder" "$folder"; then
            tries=$((tries + 1))
            [ "$tries" -lt 30 ] || { echo "share.sh: $address:$folder cannot be mounted" >&2 && exit 1; }
            sleep "${QUINTET_SHARE_PAUSE:-5}"
        fi
    done
    echo "$folder is that of $address"
}

case $1 in
    serve) serve "${@:2}" ;;
    mount) mount_from "$2" "$3" ;;
    *) usage ;;
esac
