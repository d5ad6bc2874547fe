import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rst_jax import config as config_lib
from rst_jax.main import run_command
from rst_jax.planning import compiled
from rst_jax.planning.chips import CHIPS, parse_topology
from rst_jax.planning.counts import KINDS
from rst_jax.planning.plan import batch_for, make_plan, to_dict
from rst_jax.planning.text import plan_text
from rst_jax.runtime.work import is_installed


def config(name, **fields):
    c = importlib.import_module(f"configs.{name}").get_config()
    c.update(fields)
    return config_lib.from_dict(c)


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(compiled, "is_installed", lambda _: False)


def needs(topology):
    module = "jax_plugins.xla_cuda13" if parse_topology(topology).gpu else "libtpu"
    return pytest.mark.skipif(not is_installed(module), reason=f"the compiler is missing: {module}")


def test_operations_and_all_reduce_of_resnet18_by_formula(none_installed):
    """18.9 GFLOP an image, 17 forward passes of 1.11, and each score once through every link."""
    plan = make_plan(config("cifar10_r18"), "h200:8")
    assert plan.floor.operations == pytest.approx(18.9e9, rel=0.01)
    assert plan.scores == 11_164_352
    one, eight = plan.points[0], next(p for p in plan.points if p.chips == 8)
    assert one.reduce == 0
    bytes_ = 4 * (plan.scores + plan.statistics)
    assert eight.reduce == pytest.approx(2 * 7 / 8 * bytes_ / CHIPS["h200"].link)
    assert eight.images == pytest.approx(one.images / 8)
    assert eight.step == pytest.approx(plan.floor_step)
    assert plan.steps_per_epoch == 175
    assert plan.hours(one) == pytest.approx(one.step * 175 * 160 * 9 / 3600)
    assert "all-reduce" in plan_text(plan)
    assert "step" not in to_dict(plan)


def test_the_batch_for_an_efficiency_reaches_it_and_one_row_less_does_not(none_installed):
    plan = make_plan(config("cifar10_r18"), "h200:8")
    enough = batch_for(plan, 0.9, 8)
    reduce = 4 * (plan.scores + plan.statistics) * 2 * 7 / 8 / CHIPS["h200"].link

    def efficiency(batch):
        return (plan.an_image * batch + plan.fixed) / 8 / (plan.an_image * batch / 8 + plan.fixed + reduce)

    assert efficiency(enough) >= 0.9 > efficiency(enough - 8)


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:4x", "v9:4x4", "h200:0", "h100:\u00b2"])
def test_a_topology_that_is_none_is_refused(topology, capsys):
    assert run_command(["x", "plan", "--config=configs/cifar10_r18.py", f"--topology={topology}"]) == 2
    assert "--topology must be a chip of v4" in capsys.readouterr().err


def test_without_a_compiler_there_is_a_floor_and_a_sentence(none_installed, tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["x", "plan", "--config=configs/imagenet_r50.py", "--topology=h100:8", f"--json={out}"]
    assert run_command([*command, "--config.batch_size=4096"]) == 0
    printed = capsys.readouterr().out
    assert "h100:8: 8 chips, 4096 images a step" in printed
    assert 'the compiler for h100 is missing: pip install "rst_jax[plan]"' in printed
    assert json.loads(out.read_text())["batch_size"] == 4096
    assert run_command([*command, f"--hlo={tmp_path / 'text'}"]) == 2
    assert "there is no compiled program" in capsys.readouterr().err
    assert not (tmp_path / "text").exists()
    assert run_command(["x", "plan", "--config=configs/imagenet_r50.py"]) == 2
    assert "--topology=v5e:4x4" in capsys.readouterr().err


# Kernels and bytes of a chip's step of the digits' network, by JAX 0.10.2 and the compiler in this version.
KEPT = {
    "h100:2": ("jax-cuda13-pjrt", "0.11.2", 494, 50_752_369),
    "v5e:2x2": ("libtpu", "0.0.52", 726, 3_884_710),
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param(t, marks=needs(t)) for t in KEPT])
def test_the_step_compiled_for_chips_that_are_not_here(topology, tmp_path, capsys):
    """The digits' network: what the command prints and writes, and that it hangs together."""
    out, text = tmp_path / "plan.json", tmp_path / "hlo.txt"
    command = ["x", "plan", "--config=configs/digits.py", f"--topology={topology}", "--kernels=3"]
    assert run_command([*command, f"--json={out}", f"--hlo={text}"]) == 0
    printed = capsys.readouterr().out
    assert "once a step, outside the attack" in printed
    assert "INSIDE A LOOP" not in printed
    assert text.read_text().startswith("HloModule")
    told = json.loads(out.read_text())
    step, attack, rest = (told[part] for part in ("step", "attack_pass", "rest"))
    for name in ("kernels", "bytes", "seconds"):
        assert sum(kind[name] for kind in told["kinds"].values()) == pytest.approx(step[name])
        assert 3 * attack[name] + rest[name] == pytest.approx(step[name], rel=0.01)
        assert step[name] > 0
    assert set(told["kinds"]) <= set(KINDS)
    assert 0 < step["memory"] < CHIPS[topology.split(":")[0]].memory
    # Channels that are padded to a kernel's blocks count, and on a TPU what is left out of a gradient does not.
    assert step["operations"] == pytest.approx(told["floor"]["operations"] * 64 // told["chips"], rel=0.15)
    assert sum(k["runs"] for k in told["kernels"]) == step["kernels"]
    assert (step["estimate"] is not None) == topology.startswith("v")
    compiler, known, kernels, moved = KEPT[topology]
    if (version(compiler), version("jax")) == (known, "0.10.2"):  # the counts are what they were
        assert step["kernels"] == pytest.approx(kernels, rel=0.02)
        assert step["bytes"] == pytest.approx(moved, rel=0.02)


@needs("a100:16")
def test_gpus_of_several_hosts_are_a_topology():
    assert len(compiled.topology_devices(parse_topology("a100:16"))) == 16
    with pytest.raises(ValueError, match="whole hosts of 8"):
        compiled.topology_devices(parse_topology("h100:12"))


@needs("v5e:1")
def test_a_topology_that_its_compiler_does_not_make_is_a_sentence():
    with pytest.raises(ValueError, match="does not make this topology"):
        compiled.topology_devices(parse_topology("v5e:3x7"))


@pytest.mark.slow
@needs("h100:1")
@needs("v5e:1x1")
def test_installed_compilers_disturb_no_other_command(tmp_path):
    root = Path(__file__).parent.parent.parent
    ticket = next((root / "zoo").glob("digits-*-0.3-*.ticket"))
    asked = ["evaluate", str(ticket), "--dataset=digits", "--eps=0.12", "--attacks=fgsm", "--examples=10"]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "rst_jax", *asked]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FGSM" in done.stdout
