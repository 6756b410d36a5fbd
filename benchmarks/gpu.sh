#!/usr/bin/env bash
# Measures on one GPU what `benchmarks/gpu.py` says, in at most eight minutes; installs nothing.
#   benchmarks/gpu.sh [FOLDER] [--tiny]
# The folder (default: gpu_report) then has gpu.json and gpu.md, also of a run that was cut short.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=gpu_report
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    folder=$1
    shift
fi
status=0
timeout 480 python -m benchmarks.gpu "$folder" "$@" || status=$?
cat "$folder/gpu.md"
exit "$status"
