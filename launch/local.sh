#!/usr/bin/env bash
# Several processes on this machine, as on a cluster. Only process 0 writes results and prints them.
#
#   launch/local.sh [--dry-run] 2 --config=configs/digits.py --workdir=runs/two
#
# When a process fails, the others get SIGTERM and, RST_GRACE_SECONDS (30) later, SIGKILL. Codes 75 and those from
# 128 on start all of them again, at most RST_MAX_RESTARTS (100) times; any other code of any process ends this
# script with it. SIGTERM and SIGINT are passed on, and the script ends with 75 once the processes have saved.
set -euo pipefail

dry_run=
if [ "${1-}" = --dry-run ]; then dry_run=1 && shift; fi
case ${1-} in '' | *[!0-9]* | 0*) count= ;; *) count=$1 ;; esac
if [ -z "$count" ] || [ $# -lt 2 ]; then
  sed -n '2,4p' "$0" >&2
  exit 2
fi
shift

pids=() # of the processes that still run
code=0  # of the whole set so far
asked=  # to stop, from outside
pass_on=
trap 'asked=1 pass_on=1' TERM INT
trap 'end TERM' EXIT

run() { # print a command, or start it in the background
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@" && echo
  else
    "$@" &
    pids+=($!)
  fi
}

end() { # send a signal to what still runs
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

again() { [ "$1" -eq 75 ] || [ "$1" -ge 128 ]; } # may a set with this code start again?

start() {
  local port=${RST_PORT:-$((20000 + RANDOM % 12000))} i
  for ((i = 0; i < count; i++)); do
    run python -m rst_jax.main "$@" --coordinator="localhost:$port" --num_processes="$count" --process_id="$i"
  done
}

watch() { # until all have ended; sets code, in which a code that forbids another start stays
  local deadline='' running pid ended
  code=0
  while [ ${#pids[@]} -gt 0 ]; do
    if [ -n "$pass_on" ]; then pass_on='' && end TERM; fi
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then end KILL; fi
    sleep 0.2 || true
    running=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      ended=0
      wait "$pid" || ended=$?
      if [ "$ended" -ne 0 ] && { [ "$code" -eq 0 ] || again "$code"; }; then code=$ended; fi
    done
    pids=("${running[@]}")
    if [ "$code" -ne 0 ] && [ -z "$deadline" ]; then
      deadline=$((SECONDS + ${RST_GRACE_SECONDS:-30}))
      end TERM
    fi
  done
}

for ((restarts = 0; ; restarts++)); do
  start "$@"
  if [ -n "$dry_run" ]; then exit 0; fi
  watch
  if ! again "$code"; then exit "$code"; fi
  if [ -n "$asked" ]; then exit 75; fi
  if [ "$restarts" -ge "${RST_MAX_RESTARTS:-100}" ]; then exit "$code"; fi
  echo "launch/local.sh: ended with code $code; starting again" >&2
done
