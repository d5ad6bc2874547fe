#!/usr/bin/env bash
# Everything that wants an accelerator, in order, within so many minutes: the tests against the CPU's numbers, the
# benchmarks (once; the last compares predicted with measured times), then tickets until the time is over. Called again
# with the same --workdir, the tickets go on.
#
#   benchmarks/accelerator.sh 9 --workdir=/tmp/cifar10 --config.data_dir=DIR
#
# With --config.evaluate.card=autoattack the draw ends with evaluation cards, which go on as well. What is finished goes
# to zoo/ with benchmarks/keep.py.
# JAX_PLATFORMS=cuda,cpu unless it is set; BATCH (256) is the step's; results go to RESULTS (benchmarks/results).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,10p' "$0" >&2; exit 2; }
minutes=$1 batch=${BATCH:-256} results=${RESULTS:-benchmarks/results}
shift
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$results"
if [ ! -e "$results/accelerator.done" ]; then
  python -m pytest tests/test_accelerator.py 2>&1 | tee "$results/accelerator.log" || true # the log tells; go on
  python benchmarks/step.py --batch "$batch" --out "$results"
  python benchmarks/tickets.py --out "$results"
  python benchmarks/compiled.py here --out "$results/predicted.json" # what the compiled text predicts, beside the time
  touch "$results/accelerator.done"
fi
left=$((minutes * 60 - SECONDS))
python -m rst_jax.main --config=configs/cifar10_r18.py --minutes="$((left > 0 ? left : 0))/60" "$@"
