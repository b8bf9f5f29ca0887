#!/usr/bin/env bash
# All tests: those with jobs of several ranks, one after the other, and beside them the rest, on what they leave of the
# cores.
#
#   bash tests/run.sh [ARGUMENTS]     with arguments: pytest, with those
set -euo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/python -m pytest)
if (($#)); then exec "${pytest[@]}" "$@"; fi

log=$(mktemp)
nice "${pytest[@]}" -m "not gpu and not network and not jobs" >"$log" 2>&1 &
rest=$!
trap 'kill "$rest" 2>/dev/null; rm -f "$log"' EXIT
code=0
"${pytest[@]}" -m "not gpu and not network and jobs" || code=$?
wait "$rest" || code=$?
cat "$log"
exit "$code"
