#!/usr/bin/env bash
# A Slurm of its own on this machine, for tests and for trying the scripts of slurm/: Debian's slurm-wlm and munge, one
# slurmctld, and some slurmd that each play a node.
#
#   sudo tests/slurm_cluster.sh start FOLDER [NODES [CPUS]]   2 nodes of 2 CPUs; prints what to export
#   sudo tests/slurm_cluster.sh stop FOLDER
#
# Everything is in the folder: configuration, keys, logs and state. A node has as many CPUs as you say, whatever the
# machine has, and no GPUs.
set -euo pipefail

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d' >&2
    exit 2
}

[ $# -ge 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
nodes=${3:-2} cpus=${4:-2}

need() {
    for program in slurmctld slurmd munged; do
        if ! PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null; then
            echo "slurm_cluster.sh: $program is not there; on Debian and Ubuntu: apt-get install slurm-wlm munge" >&2
            exit 2
        fi
    done
    [ "$(id -u)" = 0 ] || { echo "slurm_cluster.sh: slurmd starts jobs as their users, so this needs root" >&2; exit 2; }
}

# free_ports N: ports that nothing listens on
free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys

sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

configure() {
    local ports memory host number
    read -ra ports <<<"$(free_ports $((nodes + 1)))"
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    host=$(hostname -s)
    mkdir -p "$folder/state" "$folder/spool" "$folder/log"
    {
        cat <<CONF
ClusterName=quintet
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=20
InactiveLimit=0
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_setup_env_fail
CONF
        for ((number = 1; number <= nodes; number++)); do
            echo "NodeName=node$number NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[number]}" \
                "CPUs=$cpus RealMemory=$memory State=UNKNOWN"
        done
        echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    } >"$folder/slurm.conf"
}

start_munge() {
    if [ ! -f "$folder/munge.key" ]; then
        (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    fi
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/log/munged" --seed-file="$folder/munge.seed" 2>>"$folder/log/munged"
}

start() {
    need
    configure
    start_munge
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    for ((number = 1; number <= nodes; number++)); do slurmd -N "node$number"; done
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ]; then
            echo "export SLURM_CONF=$folder/slurm.conf"
            return
        fi
        sleep 0.5
    done
    echo "slurm_cluster.sh: the nodes are not idle after 30 seconds; see $folder/log" >&2
    sinfo -N -l >&2 || true
    stop
    exit 1
}

# The daemons by their files, and what jobs have left running.
stop() {
    local pid file
    export SLURM_CONF="$folder/slurm.conf"
    if [ -f "$SLURM_CONF" ]; then timeout 10 scancel --full --state=RUNNING --quiet --user=root 2>/dev/null || true; fi
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
    done
}

PATH="$PATH:/usr/sbin"
case $action in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
