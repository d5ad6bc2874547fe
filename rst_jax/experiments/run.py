"""A run: its workdir, and the parts assembled for it."""

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax import subnet
from rst_jax.config import Config
from rst_jax.data import load_dataset
from rst_jax.data.feed import Feed, batch_sizes
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.models import ModelSpec
from rst_jax.records import provenance
from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import AXIS, from_main, is_main, make_mesh, on_cpu, on_main
from rst_jax.runtime.progress import Say
from rst_jax.runtime.workdir import hold, read_record, refuse_foreign
from rst_jax.tickets.ticket import Ticket, load_ticket
from rst_jax.training.loop import Trainer
from rst_jax.training.metrics import MetricsWriter
from rst_jax.training.state import init_variables

Tree = Any


def name_of(ratio: float) -> str:
    """A ticket's name in the workdir."""
    return f"ratio-{ratio:g}"


class Run:
    """Everything that the parts of a draw share; heavy things are made when first asked for."""

    def __init__(self, config: Config, workdir: Path, say: Say):
        self.config, self.workdir, self.say, self.is_main = config, workdir, say, is_main()
        self.mesh = make_mesh()
        self.dataset = load_dataset(config)
        self.image_shape = self.dataset.train.images.shape[1:]
        self.model_spec: dict[str, Any] = {
            "name": config.model,
            "num_classes": self.dataset.num_classes,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
        }
        batch_sizes(len(self.dataset.train), config.batch_size, self.mesh.size)
        self.dtype = config.compute_dtype
        if self.dtype == "auto":
            self.dtype = "float32" if on_cpu(self.mesh) else "bfloat16"
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("config: compute_dtype = 'float64' needs the environment variable JAX_ENABLE_X64=1.")
        self.param_dtype = jnp.float64 if self.dtype == "float64" else jnp.float32

    def module(self, **types: Any) -> Any:
        """The network; `types` as in `ModelSpec`."""
        spec = self.model_spec
        mean, std = tuple(spec["mean"]), tuple(spec["std"])
        return ModelSpec(spec["name"], spec["num_classes"], mean, std).make(**types)

    def key(self, purpose: str) -> np.ndarray:
        """Key data of the run's key for a purpose: init, order, step or evaluate."""
        place = ("init", "order", "step", "evaluate").index(purpose)
        return np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(self.config.seed), place)))

    @cached_property
    def trainer(self) -> Trainer:
        """The loop over the training images, computing in the configured type."""
        return Trainer(
            self.config,
            self.module(
                dtype=jnp.dtype(self.dtype),
                param_dtype=self.param_dtype,
                bn_axis=AXIS if self.config.bn_sync else None,
                remat=self.config.remat,
            ),
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
        return Evaluator(self.module(), self.config, self.mesh, self.key("evaluate"))

    @cached_property
    def variables(self) -> dict[str, Tree]:
        """The untrained network that every ratio starts from: params, scores, batch_stats."""
        c = self.config
        return init_variables(
            self.module(param_dtype=self.param_dtype),
            self.image_shape,
            jax.random.wrap_key_data(jnp.asarray(self.key("init"))),
            pattern=c.pattern,
            weight_init=c.weight_init,
            fan_scale=c.remaining_ratios[0] if c.scale_fan else 1.0,
        )

    def ticket_path(self, name: str) -> Path:
        """Where a ticket's file lies."""
        return self.workdir / "tickets" / f"{name}.ticket"

    def tickets(self) -> list[Ticket]:
        """The tickets drawn so far for the configured ratios, in ascending order, then the dense network.

        Raises:
          ValueError: one is missing.
        """
        names = [name_of(r) for r in sorted(self.config.remaining_ratios)] + ["dense"] * self.config.dense.train
        there = from_main(np.asarray([self.ticket_path(name).exists() for name in names]))
        missing = [name for name, found in zip(names, there, strict=True) if not found]
        if missing:
            raise ValueError(
                f"{self.workdir}: {', '.join(missing)} not drawn yet; run with --config.task=search first."
            )
        return [load_ticket(self.ticket_path(name)) for name in names]

    def check_init(self) -> None:
        """Refuse ratios that keep nothing of a layer, before any work."""
        for ratio in self.config.remaining_ratios:
            subnet.kept_counts(self.variables["scores"], ratio)


@contextlib.contextmanager
def claimed(workdir: Path, run: Run) -> Iterator[None]:
    """Hold the workdir for this run, and check that it belongs to this configuration and these images.

    The first process holds it and tells the others whether it could.

    Raises:
      ValueError: another process holds it, it holds something else, or another configuration; nothing is written.
    """
    with contextlib.ExitStack() as held:
        on_main(lambda: _claim(workdir, run, held))
        yield


def _claim(workdir: Path, run: Run, held: contextlib.ExitStack) -> None:
    record, drawing, called = workdir / "config.json", run.config.task in ("draw", "search"), f"workdir {workdir}"
    refuse_foreign(workdir, record.name, called, "run")
    if not drawing and not record.exists():
        raise ValueError(f"{called} holds no run; start with --config.task=draw.")
    hold(workdir, called, "--workdir", held)
    now = json.loads(json.dumps({"config": run.config.to_dict(), "dataset_digest": run.dataset.digest}))
    before = read_record(record, "--workdir")
    if before is not None:
        try:
            old = _dotted(before["config"])
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{record}: cannot be read ({error}); take a new --workdir.") from error
        changed = [
            f"{name} was {old.get(name)!r}, now {value!r}"
            for name, value in _dotted(now["config"]).items()
            if old.get(name) != value and not _may_change(name, run.config)
        ]
        if before.get("dataset_digest") != now["dataset_digest"]:
            changed.append("the images are not the same")
        if changed:
            raise ValueError(f"{called} belongs to another run: {'; '.join(changed)}. Take a new --workdir.")
    if drawing and (before or {}).get("config") != now["config"]:
        write_json(record, {**now, "provenance": vars(provenance())})


def _dotted(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, those of sections by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _may_change(field: str, config: Config) -> bool:
    """What may differ when a workdir is used again, since it changes no finished ticket."""
    free = {"task", "data_dir", "data_path", "unroll", "steps_per_dispatch", "compilation_cache"}
    free |= {"checkpoint_every_epochs", "log_every_steps", "remat", "evaluate.card"}
    return field in free or (field == "remaining_ratios" and not config.scale_fan)
