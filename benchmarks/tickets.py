"""Whether several tickets are drawn faster in one program than one after the other, from how small a network.

    python benchmarks/tickets.py

The search step of four remaining ratios that share one network's weights, batch and attack: four calls of the step
against one call of its `jax.vmap` over scores, statistics, momentum and kept counts. Takes turns; medians.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rst_jax import subnet
from rst_jax.config import PGDSettings
from rst_jax.initializers import init_variables
from rst_jax.models.resnet import ResNet
from rst_jax.records import provenance
from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import make_mesh, on_cpu
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_update
from rst_jax.training.target import Scores

RATIOS = (0.05, 0.1, 0.3, 0.5)


def contenders(width: int, batch: int) -> dict[str, Callable[[], Any]]:
    """The step of all ratios, singly and together, for two residual blocks of `width` channels on 8x8 images."""
    model = ResNet(num_classes=10, blocks=(1, 1), widths=(width, width), stem_stride=2, mean=(0.5,), std=(0.5,))
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    v = init_variables(model, (8, 8, 1), jax.random.key(0))
    state = TicketState(jnp.int32(0), v["params"], v["scores"], v["batch_stats"], sgd.init(v["scores"]))
    settings = Settings(Scores(), ThreatModel(0.12), PGDSettings(3, 0.05), unroll=on_cpu(make_mesh()))
    update = make_update(model, sgd, settings)
    images = jax.random.uniform(jax.random.key(1), (batch, 8, 8, 1))
    labels = jnp.arange(batch, dtype=jnp.int32) % 10
    kept = [jax.tree.map(jnp.asarray, subnet.kept_counts(v["scores"], ratio)) for ratio in RATIOS]

    def stacked(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    own = [(state.scores, state.batch_stats, state.opt_state)] * len(RATIOS)
    scores, stats, opt_state = stacked(own)
    all_states = dataclasses.replace(state, scores=scores, batch_stats=stats, opt_state=opt_state)
    axes: Any = TicketState(None, None, 0, 0, 0)
    single = jax.jit(update)
    together = jax.jit(jax.vmap(update, in_axes=(axes, None, None, None, 0), out_axes=(axes, 0)))
    counts = stacked(kept)
    return {
        "singly": lambda: jax.block_until_ready([single(state, images, labels, None, k) for k in kept]),
        "together": lambda: jax.block_until_ready(together(all_states, images, labels, None, counts)),
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for width in args.widths:
        runs = contenders(width, args.batch)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.runs + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - start)
        singly, together = (statistics.median(seconds[name]) for name in ("singly", "together"))
        print(
            f"width {width:3}, batch {args.batch}: {len(RATIOS)} tickets singly {1e3 * singly:7.1f} ms, "
            f"together {1e3 * together:7.1f} ms, {singly / together:.2f} times as fast",
            flush=True,
        )
        rows.append({"width": width, "seconds": seconds, "times_as_fast": singly / together})
    path = args.out / f"tickets_{jax.devices()[0].platform}_b{args.batch}.json"
    write_json(path, {"batch": args.batch, "measured": rows, "provenance": vars(provenance())})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
