#!/usr/bin/env bash
# Makes this machine ready: checks its GPU driver and Python, and installs the project. prepare.sh runs it on each machine
# of a hostfile, sky.yaml on its own. Doing it again changes nothing that is in order. It reports in one line, which
# begins with "ready" or "FAILED".
#
#   bash configs/cluster/machine.sh [GPUS [TORCH_INDEX [PACKAGE...]]]
#
#   GPUS          how many there must be; "" for none
#   TORCH_INDEX   where torch comes from, as in `make install TORCH_INDEX=URL`; "" for pip's own
#   PACKAGE       what is installed beside the project: s3fs, gcsfs
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus=${1:-} torch_index=${2:-} more=("${@:3}")

fail() {
    echo "FAILED: $1"
    exit 1
}

new_enough() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

if [ -n "$gpus" ]; then
    mend='sudo apt-get install -y ubuntu-drivers-common && sudo ubuntu-drivers install --gpgpu && sudo reboot'
    command -v nvidia-smi >/dev/null || fail "no NVIDIA driver; $mend"
    names=$(nvidia-smi --query-gpu=name --format=csv,noheader) || fail "nvidia-smi: ${names%%$'\n'*}"
    found=$(wc -l <<<"$names")
    [ "$found" -ge "$gpus" ] || fail "$found GPUs where the hostfile says slots=$gpus"
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n1)
fi

if ! find_python >/dev/null || ! command -v make >/dev/null || ! command -v pdsh >/dev/null; then
    packages=(make pdsh python3-venv)
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        packages+=(python3.11 python3.11-venv) # Ubuntu 22.04 has it beside its own 3.10
    fi
    sudo -n true || fail "lacks packages, and sudo wants a password; sudo apt-get install -y ${packages[*]}"
    sudo apt-get update -qq
    sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" || fail "apt-get install ${packages[*]}"
fi
python=$(find_python) || fail "no Python of 3.11 or newer with its venv module"
exec 9>>Makefile && flock 9 # machines may share this folder
make install PYTHON="$python" TORCH_INDEX="$torch_index" || fail "make install"
if [ ${#more[@]} -gt 0 ]; then
    .venv/bin/python -m pip install --quiet --constraint constraints.txt "${more[@]}" || fail "pip install ${more[*]}"
fi

ready="ready, $(.venv/bin/python --version)"
if [ -n "$gpus" ]; then
    sees=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())') || fail "torch cannot be imported"
    [ "$sees" -ge "$gpus" ] || fail "torch sees $sees GPUs of $found; driver $driver may be too old for its CUDA"
    ready+=", $found x ${names%%$'\n'*}, driver $driver"
fi
echo "$ready"
