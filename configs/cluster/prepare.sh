#!/usr/bin/env bash
# Makes every machine of a hostfile ready to train: the project at the same path, its tested libraries, a GPU driver that
# answers. Doing it again changes nothing that is in order.
#
#   bash configs/cluster/prepare.sh [--packages NAMES] [--share FOLDER] [--torch-index URL] [--no-gpu] [HOSTFILE]
#
#   HOSTFILE             configs/cluster/hostfile when left out; see hostfile.example
#   --packages NAMES     what is installed beside the project: "s3fs", "gcsfs adlfs"
#   --share FOLDER       also share FOLDER of the first machine with the others over NFS (needs sudo there)
#   --torch-index URL    where torch comes from, as in `make install TORCH_INDEX=URL`
#   --no-gpu             machines without GPUs
#
# Run it on the first machine, from the checkout; ssh must reach all of them without a password, the first one too.
# PDSH_SSH_ARGS_APPEND holds further options of ssh, as it does for DeepSpeed. One line for each machine; the exit code
# is 1 when one is not ready, and 2 when nothing was tried.
set -euo pipefail
cd "$(dirname "$0")/../.."

complain() {
    echo "prepare.sh: $1" >&2
    exit 2
}

share='' torch_index='' packages=() gpu=1 hostfile=configs/cluster/hostfile
while [ $# -gt 0 ]; do
    case $1 in
        --share | --torch-index | --packages) [ $# -gt 1 ] || complain "$1: a value must follow" ;;&
        --share) share=$2 && shift ;;
        --torch-index) torch_index=$2 && shift ;;
        --packages) read -ra packages <<<"$2" && shift ;;
        --no-gpu) gpu='' ;;
        -*) complain "$1: not an option; they are --packages, --share, --torch-index and --no-gpu" ;;
        *) hostfile=$1 ;;
    esac
    shift
done
[ -f "$hostfile" ] || complain "$hostfile: no such file; copy configs/cluster/hostfile.example and name your machines"
[ -z "$share" ] || [ "${share#/}" != "$share" ] || complain "--share $share: give a path that begins with /"

hosts=() slots=()
while read -r host rest; do
    [ -n "${host%%#*}" ] || continue
    [[ $rest =~ ^slots=([1-9][0-9]*)( *#.*)?$ ]] || complain "$hostfile: '$host $rest' is not HOST slots=NUMBER"
    hosts+=("$host") slots+=("${BASH_REMATCH[1]}")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || complain "$hostfile: names no machine"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
read -ra more_options <<<"${PDSH_SSH_ARGS_APPEND:-}"
# A machine that was made a minute ago is not known yet: its key is taken at the first meeting, and compared from then on.
remote=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=accept-new "${more_options[@]}")

# copy HOST: the files of the project, unless the machine sees this very folder
copy() {
    local mark=".prepare-$$-$1" place files=(--exclude=./.venv --exclude=./runs --exclude=./demo .) code=0
    place=$(printf %q "$PWD")
    touch "$mark"
    # shellcheck disable=SC2029 # the path is ours, and quoted for the other side
    if ! "${remote[@]}" "$1" "test -e $place/$mark" </dev/null; then
        if git rev-parse --git-dir >/dev/null 2>&1; then
            # what git knows and is there, and your own recipes
            { git ls-files -z && git ls-files -z --others --exclude-standard -- configs; } |
                while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done >"$logs/$1.files"
            files=(--null --files-from="$logs/$1.files")
        fi
        # shellcheck disable=SC2029
        tar --create --gzip "${files[@]}" |
            "${remote[@]}" "$1" "mkdir -p $place && tar --extract --gzip --directory $place" || code=1
    fi
    rm -f "$mark"
    return "$code"
}

# prepare HOST SLOTS: all of it, for one machine
prepare() {
    if ! "${remote[@]}" "$1" true </dev/null; then
        echo "FAILED: no answer over ssh; try: ssh $1"
    elif ! copy "$1"; then
        echo "FAILED: the project could not be copied to $PWD"
    else
        local command=(bash "$PWD/configs/cluster/machine.sh" "${gpu:+$2}" "$torch_index" "${packages[@]}")
        # shellcheck disable=SC2029
        "${remote[@]}" "$1" "$(printf '%q ' "${command[@]}")" </dev/null
        return
    fi
    return 1
}

jobs=()
for number in "${!hosts[@]}"; do
    prepare "${hosts[number]}" "${slots[number]}" >"$logs/$number" 2>&1 &
    jobs+=($!)
done
failed=()
for number in "${!hosts[@]}"; do
    if ! wait "${jobs[number]}"; then
        failed+=("${hosts[number]}")
        grep -v '^FAILED: ' "$logs/$number" | tail -n 20 | sed "s/^/  ${hosts[number]}| /" >&2 || true
    fi
    # Not always the last line: ssh carries what is said on two ways.
    report=$(grep -E '^(ready|FAILED: )' "$logs/$number" | tail -n 1) || report="FAILED: ended without a word"
    echo "${hosts[number]}: $report"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "prepare.sh: not ready: ${failed[*]}" >&2
    exit 1
fi

if [ -n "$share" ]; then
    there="cd $(printf %q "$PWD") && bash configs/cluster/share.sh"
    # shellcheck disable=SC2029
    "${remote[@]}" "${hosts[0]}" "$there serve $(printf '%q ' "$share" "${hosts[@]:1}")" </dev/null
    for host in "${hosts[@]:1}"; do
        # shellcheck disable=SC2029
        "${remote[@]}" "$host" "$there mount $(printf '%q ' "${hosts[0]}" "$share")" </dev/null
    done
fi
