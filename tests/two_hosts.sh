#!/usr/bin/env bash
# Two hosts on this machine, for tests and for trying hostfiles: network namespaces joined by a cable (veth), an sshd in
# each, and a key that opens both. They share files and processes with this machine, not the network.
#
#   sudo tests/two_hosts.sh start FOLDER    prints what to export; FOLDER/hostfile names the hosts
#   sudo ip netns exec quintet1 ...         a command on the first of them
#   sudo tests/two_hosts.sh stop FOLDER
set -euo pipefail

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d' >&2
    exit 2
}

[ $# = 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)
PATH="$PATH:/usr/sbin:/sbin"

need() {
    for program in ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh; do
        if ! command -v "${program%:*}" >/dev/null; then
            echo "two_hosts.sh: ${program%:*} is not there; on Debian and Ubuntu: apt-get install ${program#*:}" >&2
            exit 2
        fi
    done
    [ "$(id -u)" = 0 ] || { echo "two_hosts.sh: network namespaces need root" >&2; exit 2; }
}

start_host() {
    local number=$1
    ip -n "quintet$number" link set lo up
    ip -n "quintet$number" address add "10.77.0.$number/24" dev cable
    ip -n "quintet$number" link set cable up
    cat >"$folder/sshd$number.conf" <<CONF
ListenAddress 10.77.0.$number
HostKey $folder/host_key
AuthorizedKeysFile $folder/key.pub
PidFile $folder/sshd$number.pid
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PrintMotd no
CONF
    ip netns exec "quintet$number" "$(command -v sshd)" -f "$folder/sshd$number.conf" -E "$folder/sshd$number.log"
}

start() {
    need
    for name in key host_key; do
        [ -f "$folder/$name" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/$name"
    done
    mkdir -p /run/sshd # where sshd wants to be at home
    stop               # what a start left that was killed before its stop
    ip netns add quintet1
    ip netns add quintet2
    ip link add cable netns quintet1 type veth peer name cable netns quintet2
    start_host 1
    start_host 2
    printf '10.77.0.%s slots=1\n' 1 2 >"$folder/hostfile"
    options="-i $folder/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    echo "export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND='$options'"
}

stop() {
    local number
    for number in 1 2; do
        for pid in $(ip netns pids "quintet$number" 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns delete "quintet$number" 2>/dev/null || true
    done
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
