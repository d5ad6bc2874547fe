#!/usr/bin/env bash
# Several processes on this machine, as on a cluster:  launch/local.sh 2 --config=configs/digits.py --workdir=runs/two
# Only process 0 writes results and prints them; when one process fails, all stop.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
count=$1
shift
port=$((20000 + RANDOM % 20000))
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < count; i++)); do
  python -m rst_jax.main "$@" --coordinator="localhost:$port" --num_processes="$count" --process_id="$i" &
  pids+=($!)
done
for _ in "${pids[@]}"; do wait -n || exit $?; done
