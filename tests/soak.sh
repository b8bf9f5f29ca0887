#!/usr/bin/env bash
# A training job mistreated for a while: ranks and launcher are killed, stopped and asked to leave every few seconds, and
# the job is started again each time. What comes out must be what an undisturbed run gives, to the last bit.
#
#   tests/soak.sh [MINUTES] [SEED]     half an hour, from seed 1; prints every fault and, at the end, a summary
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || { echo "soak.sh: .venv is not there; run make install" >&2; exit 2; }
PYTHONPATH=".:tests${PYTHONPATH:+:$PYTHONPATH}" exec .venv/bin/python tests/soak.py "${1:-30}" "${2:-1}"
