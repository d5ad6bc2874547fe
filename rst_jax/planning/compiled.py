"""The real step, compiled for a topology that this machine does not have; no array is made.

Both compilers are the wheels of the extra `plan`: libtpu for TPUs, and for GPUs jax-cuda13-pjrt, which needs neither
driver nor cuDNN and is told of the card in a file of `targets/`.
"""

import dataclasses
import functools
import math
import os
import time
from importlib import resources
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
from rst_jax.planning.chips import Topology
from rst_jax.planning.hlo import Program
from rst_jax.runtime.mesh import AXIS
from rst_jax.runtime.work import is_installed, without_standard_error
from rst_jax.training.loop import Job, make_job_step
from rst_jax.training.optimizer import make_optimizer, make_schedule
from rst_jax.training.state import TicketState
from rst_jax.training.target import Scores, Target


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as the compiler made it, for one chip of many.

    Attributes:
      text: the compiled program's.
      seconds: that the compiler took.
      memory: bytes in use at most: arguments, outputs that are not donated, temporaries and code.
      executable: what can be called, where there are such devices.
    """

    text: str
    seconds: float
    memory: int
    executable: jax.stages.Compiled

    @functools.cached_property
    def program(self) -> Program:
        """The text, taken apart."""
        return Program(self.text)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, which exist for the compiler alone.

    Raises:
      ImportError: the compiler is not installed; says how it is.
      ValueError: there is no such topology.
    """
    if not is_installed("jax_plugins.xla_cuda13" if topology.gpu else "libtpu"):
        wheel = "jax-cuda13-pjrt" if topology.gpu else "libtpu"
        raise ImportError(f'the compiler for {topology.name} is missing: pip install "rst_jax[plan]", or {wheel} alone')
    island = min(topology.chips, topology.chip.island)
    if topology.chips % island:
        raise ValueError(f"--topology={topology.text}: more than {island} GPUs are whole hosts of {island}.")
    from jax.experimental import topologies

    # Nothing but the compiler is asked of the library: it need not look for a TPU and its neighbours.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        with without_standard_error():
            if topology.gpu:
                target = resources.files("rst_jax.planning").joinpath("targets", f"{topology.name}.txt").read_text()
                described = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=topology.name,
                    target_config=target,
                    topology=f"1x{topology.chips // island}x{island}",
                )
            else:
                one = {"v5e:1": "v5e:1x1", "v6e:1": "v6e:1x1"}
                name = one.get(topology.text, topology.text)
                described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the library's own kinds
        axes = "" if topology.gpu else " A slice has two axes, as v5e:4x4, or three, as v5p:2x2x1."
        reason = str(error).rstrip(".")
        raise ValueError(
            f"--topology={topology.text}: the compiler does not make this topology ({reason}).{axes}"
        ) from error
    return list(described.devices)


def compile_program(program: Any, *arguments: PyTree) -> Compiled:
    """A jitted function, compiled for the devices that its arguments' shardings name."""
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(arguments) if hasattr(leaf.sharding, "mesh"))
    elsewhere = mesh.devices.flat[0] not in jax.devices() and mesh.devices.flat[0].platform != "tpu"
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if elsewhere else {}  # no card to try kernels on
    start = time.monotonic()
    with without_standard_error():
        made: Any = program.lower(*arguments).compile(options)
    seconds = time.monotonic() - start
    m = made.memory_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Compiled(made.as_text(), seconds, memory + m.temp_size_in_bytes + m.generated_code_size_in_bytes, made)


def placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Shapes that lie on a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_step(
    config: Config,
    mesh: Mesh,
    variables: PyTree,
    image_shape: tuple[int, ...],
    classes: int,
    n: int,
    target: Target | None = None,
) -> Compiled:
    """The step of the loop, compiled for a mesh; arguments are shapes alone. It is the search's or another target's."""
    target = target or Scores()
    wide = "float32" if config.compute_dtype == "float32" else "bfloat16"
    types: dict[str, Any] = {
        "dtype": jnp.dtype(wide),
        "bn_axis": AXIS if config.bn_sync else None,
        "remat": config.remat,
    }
    half = (0.5,) * image_shape[-1]
    model = ModelSpec(config.model, classes, half, half).make(**types)
    facts, rows = CATALOG.get(config.dataset), config.batch_size
    streamed = facts is not None and facts.streamed > 0
    job, per_epoch = Job("plan", target, config.epochs, config.optimizer), -(-n // rows)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.epochs, per_epoch))
    step = make_job_step(
        config, model, optimizer, job, mesh, rows, config.attack.pgd(config.epochs), many=False, streamed=streamed
    )

    def struct(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    opt_state = jax.eval_shape(optimizer.init, variables[target.collection])
    make_state: Any = TicketState
    make_images: Any = Images
    state = make_state(struct(), variables["params"], variables["scores"], variables["batch_stats"], opt_state)
    held = rows if streamed else n
    pixels = struct(held, math.prod(image_shape), dtype=jnp.uint8)
    images = make_images(pixels, struct(held), struct(held), image_shape, 255)
    order = struct(0 if streamed else n)
    kept = jax.tree.map(lambda _: struct(), variables["scores"]) if isinstance(target, Scores) else {}
    everywhere = PartitionSpec()
    first = placed(state, mesh, everywhere), placed(images, mesh, PartitionSpec(AXIS) if streamed else everywhere)
    others = placed((order, struct(), kept, struct(2, dtype=jnp.uint32), struct()), mesh, everywhere)
    return compile_program(step, *first, *others)
