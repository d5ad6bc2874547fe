#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice: requests the slice or takes the one of that name, copies the working tree
# there, installs it, starts the program on every host and follows the log of host 0.
#
#   launch/tpu_pod.sh [--dry-run] [--name=rst-jax] [--zone=us-central1-a] [--type=v5litepod-16]
#                     [--runtime=v2-alpha-tpuv5-lite] [--spot] [--bucket=NAME] [--delete]
#                     --config=configs/cifar10_r18.py --workdir=/bucket/cifar10_r18
#
# The workdir must be on storage that all hosts see and that outlives the slice: --bucket mounts a Cloud Storage bucket
# as /bucket on every host. Make it with hierarchical namespace, which renames a folder at once, as checkpoints need:
#   gcloud storage buckets create gs://NAME --location=us-central1 --uniform-bucket-level-access \
#     --enable-hierarchical-namespace
#
# A preempted slice is requested again, and a run that ended with 75 or with a signal's code is started again, at most
# RST_MAX_RESTARTS (100) times together. The run does not need this script: after Ctrl-C or a lost connection it goes
# on, and the same command follows it again. The slice stays, and costs, unless --delete is given. Needs gcloud with a
# project set, and its SSH key without a passphrase or in the agent.
set -euo pipefail
cd "$(dirname "$0")/.."
exec 3>&1 < /dev/null

dry_run='' name=rst-jax zone=us-central1-a type=v5litepod-16 runtime=v2-alpha-tpuv5-lite spot='' bucket='' delete=''
if [ "${1-}" = --dry-run ]; then dry_run=1 && shift; fi
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    *) break ;;
  esac
  shift
done
if [[ ${1-} != --config=* ]]; then # so that a misspelt option costs no slice
  sed -n '5,7p' "launch/${0##*/}" >&2
  exit 2
fi

run() { # print a command, or run it
  if [ -n "$dry_run" ]; then { printf '%q ' "$@" && echo; } >&3; else "$@"; fi
}

on() { # run a shell command on a host, or on all
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --quiet \
    --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

# What the hosts are told. The program's process group is kept in rst_jax.pid, its code in rst_jax.code.
# shellcheck disable=SC2016
{
  install='rm -rf rst_jax && mkdir rst_jax && tar -xzf rst_jax.tgz -C rst_jax'
  # The images come with Python 3.10; uv brings a newer one.
  install+=' && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv'
  install+=' && python3 -m uv venv -q --seed --allow-existing --python=3.12 venv'
  install+=' && cd rst_jax && ../venv/bin/python -m pip install -q -e . "jax[tpu]"'

  # Hosts must see at once what another wrote, so nothing is cached about files.
  keys=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  mount='mountpoint -q /bucket || { { command -v gcsfuse > /dev/null || {'
  mount+=" curl -fsS $apt/doc/apt-key.gpg | sudo tee $keys > /dev/null"
  mount+=" && echo \"deb [signed-by=$keys] $apt gcsfuse-\$(lsb_release -cs) main\""
  mount+=' | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null'
  mount+=' && sudo apt-get -q update && sudo apt-get -qy install gcsfuse; }; }'
  mount+=' && sudo install -d -o "$(id -un)" /bucket'
  mount+=" && gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket /bucket; }"

  start='set -m; rm -f rst_jax.code; cd rst_jax && { (trap "" HUP; trap : TERM; export PYTHONUNBUFFERED=1;'
  start+=" ../venv/bin/python -m rst_jax.main $(printf '%q ' "$@")--coordinator=auto; echo \$? > ../rst_jax.code)"
  start+=' > ../rst_jax.log 2>&1 < /dev/null & echo $! > ../rst_jax.pid; }'

  ask='if kill -0 "$(cat rst_jax.pid)" 2> /dev/null; then echo running; fi'
  follow='tail -n +1 -f -s 0.2 --pid="$(cat rst_jax.pid)" rst_jax.log'

  # A minute to end like host 0, then SIGTERM, and 30 seconds later SIGKILL.
  finish='pid=$(cat rst_jax.pid); ends() { timeout "$1" tail -f -s 0.2 --pid="$pid" /dev/null; };'
  finish+=' ends 60 || { kill -TERM -- "-$pid"; ends 30; } || kill -KILL -- "-$pid";'
  finish+=' echo "rst_jax ended with $(cat rst_jax.code 2> /dev/null || echo 137)"'
}

restarts=0 code=0 poll=${RST_POLL_SECONDS:-30}
trap 'echo "launch/tpu_pod.sh: the run goes on; the same command follows it again" >&2; exit 130' INT TERM

say() { echo "launch/tpu_pod.sh: $1" >&2; }

again() { [ "$1" -eq 75 ] || [ "$1" -ge 128 ]; } # may a run with this code start again?

delete() { run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet; }

over() { # the end, with a code
  if [ -n "$delete" ]; then delete || true; fi
  exit "$1"
}

another() { # count a start
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "${RST_MAX_RESTARTS:-100}" ]; then over "$1"; fi
}

slice() { # wait until the slice is there; request it where it is not or no more
  local state seen='' failures=0
  while [ "$failures" -lt 10 ]; do
    state=$(run gcloud compute tpus queued-resources list --zone="$zone" --filter="name~/$name\$" \
      --format='value(state.state)') || state=unknown failures=$((failures + 1))
    if [ -n "$state" ] && [ "$state" != "$seen" ]; then say "the slice is $state"; fi
    seen=$state
    case $state in
      ACTIVE) return ;;
      '')
        run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
          --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot} --quiet || failures=$((failures + 1))
        if [ -n "$dry_run" ]; then return; fi
        ;;
      SUSPENDED | FAILED)
        another 75
        delete || failures=$((failures + 1))
        continue
        ;;
    esac
    sleep "$poll"
  done
  say "gcloud failed ten times; see its messages above"
  over 1
}

deploy() { # copy, install, start
  run mkdir -p build &&
    run tar -czf "build/$name.tgz" --exclude=./build --exclude=./runs --exclude=./.venv --exclude='.*_cache' \
      --exclude=__pycache__ --exclude='*.egg-info' . &&
    run gcloud compute tpus tpu-vm scp "build/$name.tgz" "$name:rst_jax.tgz" --zone="$zone" --worker=all --quiet &&
    on all "$install" &&
    { [ -z "$bucket" ] || on all "$mount"; } &&
    on all "$start"
}

round() { # until the program has ended, with its code in code; fails when the hosts cannot be reached
  local at said ended
  at=$(on 0 "$ask") || return
  if [ "$at" != running ]; then deploy || return; fi
  on 0 "$follow" || return
  said=$(on all "$finish") || return
  code=0
  while read -r ended; do # a code that forbids another start stays
    if [ "$ended" -ne 0 ] && { [ "$code" -eq 0 ] || again "$code"; }; then code=$ended; fi
  done < <(sed -n 's/^rst_jax ended with //p' <<< "$said")
}

failures=0
while :; do
  slice
  if round; then
    failures=0
    if ! again "$code"; then over "$code"; fi
    another "$code"
    say "ended with code $code; starting again"
  else
    failures=$((failures + 1))
    if [ "$failures" -eq 10 ]; then
      say "the hosts could not be set up or reached ten times; see the messages above"
      over 1
    fi
    sleep "$poll"
  fi
done
