"""The real step, compiled for a topology that this machine does not have; no array is made."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from rst_jax.config import Config
from rst_jax.data.catalog import CATALOG
from rst_jax.data.pipeline import Images
from rst_jax.models import ModelSpec
from rst_jax.planning.hlo import Collective, collectives
from rst_jax.runtime.mesh import AXIS
from rst_jax.training.loop import Job, make_job_step
from rst_jax.training.optimizer import make_optimizer, make_schedule
from rst_jax.training.state import TicketState
from rst_jax.training.target import Scores


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of the step, a chip.

    Attributes:
      memory: bytes in use at most: arguments, outputs that are not donated, temporaries and code.
      operations, traffic: as XLA counts them, the body of a loop once, bytes in on-chip memory too.
    """

    seconds: float
    memory: int
    operations: float
    traffic: float
    collectives: list[Collective]


def topology_devices(topology: str) -> list[jax.Device]:
    """The topology's devices, which exist for the compiler alone.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: there is no such topology.
    """
    import libtpu  # noqa: F401
    from jax.experimental import topologies

    # Nothing but the compiler is asked of the library: it need not look for a TPU and its neighbours.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        with _without_standard_error():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the library's own kinds
        raise ValueError(f"--topology={topology}: the TPU compiler does not make this topology ({error}).") from error
    return list(found.devices)


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """The library tells there, of itself, that it finds no TPU."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compile_step(
    config: Config, mesh: Mesh, variables: PyTree, image_shape: tuple[int, ...], classes: int, n: int
) -> Compiled:
    """The step of the loop, compiled for a mesh; arguments are shapes alone."""
    types: dict[str, Any] = {"dtype": jnp.bfloat16, "bn_axis": AXIS if config.bn_sync else None, "remat": config.remat}
    half = (0.5,) * image_shape[-1]
    model = ModelSpec(config.model, classes, half, half).make(**types)
    facts, rows = CATALOG.get(config.dataset), config.batch_size
    streamed = facts is not None and facts.streamed > 0
    job, per_epoch = Job("plan", Scores(), config.epochs, config.optimizer), -(-n // rows)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.epochs, per_epoch))
    step = make_job_step(
        config, model, optimizer, job, mesh, rows, config.attack.pgd(config.epochs), many=False, streamed=streamed
    )

    def placed(tree: PyTree, spec: PartitionSpec) -> PyTree:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def struct(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    scores = variables["scores"]
    opt_state = jax.eval_shape(optimizer.init, scores)
    make_state: Any = TicketState
    make_images: Any = Images
    state = make_state(struct(), variables["params"], scores, variables["batch_stats"], opt_state)
    held = rows if streamed else n
    pixels = struct(held, math.prod(image_shape), dtype=jnp.uint8)
    images = make_images(pixels, struct(held), struct(held), image_shape, 255)
    order = struct(0 if streamed else n)
    kept = jax.tree.map(lambda _: struct(), scores)
    everywhere = PartitionSpec()
    first = placed(state, everywhere), placed(images, PartitionSpec(AXIS) if streamed else everywhere)
    others = placed((order, struct(), kept, struct(2, dtype=jnp.uint32), struct()), everywhere)
    start = time.monotonic()
    program: Any = step.lower(*first, *others).compile()
    seconds = time.monotonic() - start
    m, cost = program.memory_analysis(), program.cost_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    memory += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    found = collectives(program.as_text())
    return Compiled(seconds, memory, cost["flops"], cost["bytes accessed"], found)
