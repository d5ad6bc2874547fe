#!/usr/bin/env bash
# Several processes on this machine, as on a cluster:  launch/local.sh 2 --config=configs/digits.py --workdir=runs/two
# Prints only process 0's output; stops all when one fails.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
count=$1
shift
port=$((20000 + RANDOM % 20000))
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = count - 1; i >= 0; i--)); do
  out=/dev/null
  [ "$i" = 0 ] && out=/dev/stdout
  python -m rst_jax.main "$@" --coordinator="localhost:$port" --num_processes="$count" --process_id="$i" >"$out" &
  pids+=($!)
done
for _ in "${pids[@]}"; do wait -n || exit $?; done
