"""A run: its workdir, and the parts assembled for it."""

import contextlib
import dataclasses
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.config import Config
from rst_jax.data import load_dataset
from rst_jax.data.feed import Feed, batch_sizes
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.records import Provenance, provenance, read_json
from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import AXIS, is_main, make_mesh, on_cpu
from rst_jax.runtime.progress import Say
from rst_jax.runtime.workdir import Claim, dotted
from rst_jax.tickets.store import TicketStore
from rst_jax.tickets.ticket import Ticket
from rst_jax.training.loop import Trainer
from rst_jax.training.metrics import MetricsWriter

DENSE = "dense"  # the dense network's name in the workdir
_PURPOSES = ("init", "order", "step", "evaluate")


def name_of(ratio: float) -> str:
    """A ticket's name in the workdir."""
    return f"ratio-{ratio:g}"


class Run:
    """Everything that the stages share; heavy things are made when first asked for."""

    def __init__(self, config: Config, workdir: Path, say: Say):
        self.config, self.workdir, self.say, self.is_main = config, workdir, say, is_main()
        self.mesh = make_mesh()
        self.dataset = load_dataset(config)
        self.image_shape = self.dataset.train.images.shape[1:]
        config.threat.check_reach(self.image_shape, "config: threat.eps")
        self.model = ModelSpec(config.model, self.dataset.num_classes, self.dataset.mean, self.dataset.std)
        self.store = TicketStore(workdir)
        batch_sizes(len(self.dataset.train), config.batch_size, self.mesh.size)
        self.dtype = config.compute_dtype
        if self.dtype == "auto":
            self.dtype = "float32" if on_cpu(self.mesh) else "bfloat16"
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("config: compute_dtype = 'float64' needs the environment variable JAX_ENABLE_X64=1.")
        self.param_dtype = jnp.float64 if self.dtype == "float64" else jnp.float32

    @property
    def claim(self) -> Claim:
        """What the workdir is held for: this configuration on these images."""
        config = self.config
        return Claim(
            folder=self.workdir,
            record="config.json",
            question={"config": config.to_dict(), "dataset_digest": self.dataset.digest},
            called=f"workdir {self.workdir}",
            holds="run",
            instead="--workdir",
            missing=dotted({"config": Config().to_dict()}),
            may_change=lambda name: name.startswith("config.") and config.may_change(name.removeprefix("config.")),
            begin=bool({"search", DENSE} & set(config.stages)),
            start="the stages 'search' and 'dense' begin one",
            about={"provenance": vars(provenance())},
        )

    def check(self) -> None:
        """Refuse, before any work, ratios that keep nothing of a layer, and stages that will miss a ticket.

        Raises:
          ValueError: says what to do.
        """
        stages = set(self.config.stages)
        if {"search", DENSE} & stages and {"evaluate", "transfer", "r2s", "cards"} & stages:
            self._see_drawn(self.config.stages)
        for ratio in self.config.remaining_ratios:
            subnet.kept_counts(self.variables["scores"], ratio)

    def module(self) -> nn.Module:
        """The network as it is trained, in the configured type."""
        return self.model.make(
            dtype=jnp.dtype(self.dtype),
            param_dtype=self.param_dtype,
            bn_axis=AXIS if self.config.bn_sync else None,
            remat=self.config.remat,
        )

    def key(self, purpose: str) -> np.ndarray:
        """Key data of the run's key for a purpose: init, order, step or evaluate."""
        place = _PURPOSES.index(purpose)
        return np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(self.config.seed), place)))

    @cached_property
    def trainer(self) -> Trainer:
        """The loop over the training images."""
        return Trainer(
            self.config,
            self.module(),
            Feed(
                self.dataset.train,
                self.config.batch_size,
                self.mesh,
                {"order": self.key("order"), "step": self.key("step")},
                steps_per_dispatch=self.config.steps_per_dispatch,
                log_every_steps=self.config.log_every_steps,
            ),
            self.workdir,
            MetricsWriter(self.workdir, self.is_main),
            self.say,
        )

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluation attack and predictions, in float32."""
        return Evaluator(self.model.make(), self.config, self.mesh, self.key("evaluate"))

    @cached_property
    def variables(self) -> dict[str, PyTree]:
        """The untrained network that every ratio starts from: params, scores, batch_stats."""
        c = self.config
        return init_variables(
            self.model.make(param_dtype=self.param_dtype),
            self.image_shape,
            jax.random.wrap_key_data(jnp.asarray(self.key("init"))),
            pattern=c.pattern,
            weight_init=c.weight_init,
            fan_scale=c.remaining_ratios[0] if c.scale_fan else 1.0,
        )

    @property
    def names(self) -> dict[str, str]:
        """What the configuration asks for, each with the stage that makes it: ratios in ascending order, then dense."""
        drawn = {name_of(ratio): "search" for ratio in sorted(self.config.remaining_ratios)}
        return drawn | ({DENSE: DENSE} if self.config.dense.train else {})

    def tickets(self) -> list[Ticket]:
        """The tickets of `names`.

        Raises:
          ValueError: one is missing; the stage that makes it is named.
        """
        self._see_drawn()
        return [self.store.load(name) for name in self.names]

    def _see_drawn(self, coming: Collection[str] = ()) -> None:
        """See that the tickets of `names` are there, or that a stage to come makes them."""
        missing = {name: stage for name, stage in self.names.items() if stage not in coming and name not in self.store}
        if missing:
            stages = ",".join(f"'{stage}'" for stage in dict.fromkeys(missing.values()))
            raise ValueError(
                f"{self.workdir}: {', '.join(missing)} not drawn yet; run with --config.stages=({stages},) first."
            )

    def keep(self, name: str, record: Any) -> None:
        """Write a record to results/, unless the same lies there: other than in when and where it was made."""
        if not self.is_main:
            return
        path = self.workdir / "results" / f"{name}.json"
        with contextlib.suppress(ValueError):  # none there, or a broken one: it is made again
            if _same(read_json(path, type(record)), record):
                return
        write_json(path, record)


def _same(a: Any, b: Any) -> bool:
    """Whether two records differ in their provenance alone."""
    nowhere = Provenance("", "", "", {}, "", "")
    return dataclasses.replace(a, provenance=nowhere) == dataclasses.replace(b, provenance=nowhere)
