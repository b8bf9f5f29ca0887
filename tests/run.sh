#!/usr/bin/env bash
# All tests: those with jobs of several ranks, one after the other, and beside them the rest, on what they leave of the
# cores. What failed is said once more at the end.
#
#   bash tests/run.sh [ARGUMENTS]     with arguments: pytest, with those
set -euo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/python -m pytest)
if (($#)); then exec "${pytest[@]}" "$@"; fi

pytest+=(--disable-warnings --durations=25)
here="not gpu and not network and not long"
logs=$(mktemp -d)
nice "${pytest[@]}" -m "$here and not jobs" >"$logs/others" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null || true; rm -rf "$logs"' EXIT
code=0
"${pytest[@]}" -m "$here and jobs" | tee "$logs/jobs" || code=$?
wait "$others" || code=$?
cat "$logs/others"
grep -hE '^(FAILED|ERROR) |^=+ .* in [0-9.]+s' "$logs/jobs" "$logs/others"
exit "$code"
