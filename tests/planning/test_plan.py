import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rst_jax import config as config_lib
from rst_jax.main import run_command
from rst_jax.planning.chips import CHIPS
from rst_jax.planning.hlo import collectives
from rst_jax.planning.plan import batch_for, make_plan, plan_text
from rst_jax.runtime.mesh import AXIS, make_mesh


def config(name, **fields):
    c = importlib.import_module(f"configs.{name}").get_config()
    c.update(fields)
    return config_lib.from_dict(c)


def test_operations_and_all_reduce_of_resnet18_by_formula():
    """18.9 GFLOP an image, 17 forward passes of 1.11, and each score once through every link."""
    plan = make_plan(config("cifar10_r18"), "h200:8")
    assert plan.operations == pytest.approx(18.9e9, rel=0.01)
    assert plan.scores == 11_164_352
    one, eight = plan.points[0], next(p for p in plan.points if p.chips == 8)
    assert one.reduce == 0
    bytes_ = 4 * (plan.scores + plan.statistics)
    assert eight.reduce == pytest.approx(2 * 7 / 8 * bytes_ / CHIPS["h200"].link)
    assert eight.compute == pytest.approx(one.compute / 8)
    assert plan.steps_per_epoch == 175
    hours = one.step * 175 * 160 * 9 / 3600
    assert plan.hours(one) == pytest.approx(hours)
    assert "all-reduce" in plan_text(plan)


def test_the_batch_for_an_efficiency_reaches_it_and_one_row_less_does_not():
    plan = make_plan(config("cifar10_r18"), "h200:8")
    enough = batch_for(plan, 0.9, 8)
    one, chip = plan.points[0], CHIPS["h200"]
    an_image = max(one.compute, one.memory) / plan.batch_size
    reduce = 4 * (plan.scores + plan.statistics) * 2 * 7 / 8 / chip.link

    def efficiency(batch):
        return (an_image * batch + one.fixed) / 8 / (an_image * batch / 8 + one.fixed + reduce)

    assert efficiency(enough) >= 0.9 > efficiency(enough - 8)


def test_collectives_are_found_with_bytes_and_place():
    """Compiled here for four CPU devices: one sum at the end, and one in a loop."""
    mesh = make_mesh()

    def summed(x):
        def body(i, x):
            return x + jax.lax.psum(x * i, AXIS)

        x = jax.lax.fori_loop(0, jnp.int32(x.sum()), body, x)
        return jax.lax.psum(x, AXIS)

    mapped = jax.shard_map(summed, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    hlo = jax.jit(mapped).lower(np.ones((3, 5), np.float32)).compile().as_text()
    found = sorted((c.kind, c.bytes, c.in_loop) for c in collectives(hlo))
    assert found == [("all-reduce", 60, False), ("all-reduce", 60, True)]


def test_the_text_of_a_tpu_program_is_read_too():
    hlo = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce.1 = (f32[4,3]{1,0:T(8,128)S(1)}, bf16[8]{0:T(1024)}) all-reduce(%a, %b), to_apply=%add
  %all-gather-start = f32[2]{0} all-gather-start(%c), dimensions={0}
}
"""
    assert [(c.kind, c.bytes, c.in_loop) for c in collectives(hlo)] == [
        ("all-reduce", 64, False),
        ("all-gather", 8, False),
    ]


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:4x", "v9:4x4", "h200:0"])
def test_a_topology_that_is_none_is_refused(topology, capsys):
    assert run_command(["x", "plan", "--config=configs/cifar10_r18.py", f"--topology={topology}"]) == 2
    assert "--topology must be a chip of v4" in capsys.readouterr().err


def test_the_command_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["x", "plan", "--config=configs/imagenet_r50.py", "--topology=h100:8", f"--json={out}"]
    assert run_command([*command, "--config.batch_size=4096"]) == 0
    printed = capsys.readouterr().out
    assert "h100:8: 8 chips, 4096 images a step" in printed
    assert '"batch_size": 4096' in out.read_text()
    assert run_command(["x", "plan", "--config=configs/imagenet_r50.py"]) == 2
    assert "--topology=v5e:4x4" in capsys.readouterr().err
