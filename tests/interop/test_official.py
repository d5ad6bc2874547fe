"""The released code's own numbers, met in float64 through the importer, model, attack, step and optimiser."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from rst_jax import subnet
from rst_jax.attacks import pgd
from rst_jax.config import PGDSettings
from rst_jax.interop import from_official
from rst_jax.models import ModelSpec
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_update
from rst_jax.training.target import Scores

TOLERANCE = 1e-9
LINF = ThreatModel(8 / 255)


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@pytest.fixture(params=["element", "row"])
def trace(request, tmp_path):
    with jax.enable_x64(True):
        found = dict(np.load(Path(__file__).parents[1] / "golden" / f"official_{request.param}.npz"))
        entries = {k.removeprefix("start/"): torch.tensor(v) for k, v in found.items() if k.startswith("start/")}
        torch.save({"state_dict": entries, "epoch": 1}, tmp_path / "start.pth")
        model = ModelSpec("wrn10_1", 10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).make(
            jnp.float64, jnp.float64
        )
        yield model, from_official(tmp_path / "start.pth", model), found


@pytest.mark.slow
def test_three_search_steps_and_pgd20(trace):
    model, variables, t = trace
    kept = subnet.kept_counts(variables["scores"], float(t["remaining_ratio"]))
    images, labels = jnp.asarray(t["images"] / 255), jnp.asarray(t["labels"], jnp.int32)

    def weights_of(scores):
        return subnet.materialise(variables["params"], scores, subnet.masks(scores, kept))

    @jax.jit
    def evaluate(scores, stats, x):
        return model.apply({"params": weights_of(scores), "batch_stats": stats}, x, train=False)

    np.testing.assert_allclose(
        evaluate(variables["scores"], variables["batch_stats"], images), t["logits_eval_0"], rtol=0, atol=TOLERANCE
    )
    train_mode, _ = model.apply(
        {"params": weights_of(variables["scores"]), "batch_stats": variables["batch_stats"]},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(train_mode, t["logits_train_0"], rtol=0, atol=TOLERANCE)

    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    update = jax.jit(make_update(model, sgd, Settings(Scores(), LINF, PGDSettings(7, 2 / 255))))
    state = TicketState(
        jnp.int32(0), variables["params"], variables["scores"], variables["batch_stats"], sgd.init(variables["scores"])
    )
    for s in range(3):
        rows = slice(16 * s, 16 * s + 16)
        state, metrics = update(state, images[rows], labels[rows], nhwc(t[f"start_noise_{s}"]), kept)
        assert 100 * float(metrics["correct"]) / float(metrics["count"]) == t[f"train_acc1_{s}"]

    masks = jax.jit(subnet.masks)(state.scores, kept)
    for path, scores in jax.tree_util.tree_leaves_with_path(state.scores):
        name = ".".join(part.key.replace("_", ".") for part in path[:-1])
        outward = np.asarray(scores) if scores.ndim == 4 else np.asarray(scores)[None, None]
        found = outward.transpose(3, 2, 0, 1).reshape(-1)
        np.testing.assert_allclose(found[::16], t[f"after3/module.{name}.scores"], rtol=0, atol=TOLERANCE)
        mask = np.asarray(masks[path[0].key]["kernel"] if len(path) == 2 else masks[path[0].key][path[1].key]["kernel"])
        mask = mask if mask.ndim == 4 else mask[None, None]
        bits = mask.transpose(3, 2, 0, 1).reshape(-1)
        np.testing.assert_array_equal(np.packbits(bits), t[f"mask_after3/{name}"])
    for path, value in jax.tree_util.tree_leaves_with_path(state.batch_stats):
        name = ".".join(part.key.replace("_", ".") for part in path[:-1]) + f".running_{path[-1].key}"
        np.testing.assert_allclose(value, t[f"after3/module.{name}"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        evaluate(state.scores, state.batch_stats, images), t["logits_eval_3"], rtol=0, atol=TOLERANCE
    )
    for before, after in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(before, after)

    attack = jax.jit(
        lambda x, y, start: pgd(
            lambda z: evaluate(state.scores, state.batch_stats, z),
            x,
            y,
            LINF,
            PGDSettings(20, 2 / 255),
            start=start,
            rest_when_broken=True,
        )
    )
    adversarial = attack(images[:8], labels[:8], nhwc(t["pgd20_start_noise"]))
    np.testing.assert_allclose(
        evaluate(state.scores, state.batch_stats, adversarial), t["pgd20_logits"], rtol=0, atol=TOLERANCE
    )


def checkpoint(path, model_name, pattern_shape=lambda s: s, drop=(), extra=()):
    """A checkpoint in the released code's layout with random float32 values, made from our module's shapes."""
    rng = np.random.default_rng(0)
    model = ModelSpec(model_name, 10, (0.5,), (0.5,)).make()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    entries = {}
    for p, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        name = "module." + ".".join(k.key.replace("_", ".") for k in p[:-1])
        oihw = (*reversed(leaf.shape[-2:]), *(leaf.shape[:-2] or (1, 1)))
        entries[name + ".weight"] = torch.tensor(rng.normal(size=oihw).astype(np.float32))
        entries[name + ".scores"] = torch.tensor(rng.normal(size=pattern_shape(oihw)).astype(np.float32))
    for p, leaf in jax.tree_util.tree_leaves_with_path(shapes.get("batch_stats", {})):
        name = "module." + ".".join(k.key.replace("_", ".") for k in p[:-1]) + f".running_{p[-1].key}"
        entries[name] = torch.tensor(rng.uniform(size=leaf.shape).astype(np.float32))
    entries = {k: v for k, v in entries.items() if k not in drop} | dict(extra)
    torch.save({"state_dict": entries}, path)
    return model, entries


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "conv4", "wrn10_1"])
def test_every_family_is_imported(tmp_path, name):
    model, entries = checkpoint(tmp_path / "a.pth", name)
    variables = from_official(tmp_path / "a.pth", model)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(variables["scores"])
    sizes = sum(v.numel() for v in entries.values())
    assert sizes == sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(("pattern", "axes"), [("element", 4), ("row", 3), ("kernel", 2), ("filter", 1)])
def test_the_pattern_is_read_off_the_scores(tmp_path, pattern, axes):
    model, entries = checkpoint(tmp_path / "a.pth", "wrn10_1", lambda shape: shape[:axes])
    variables = from_official(tmp_path / "a.pth", model)
    assert jax.tree.map(lambda s: s.shape, variables["scores"]) == jax.tree.map(
        lambda s: s.shape, subnet.score_structs(variables["params"], pattern)
    )
    theirs = entries["module.block2.layer.0.conv1.scores"].numpy()
    ours = np.asarray(variables["scores"]["block2_layer_0"]["conv1"]["kernel"])
    np.testing.assert_array_equal(ours.transpose(3, 2, 0, 1).reshape(-1), theirs.reshape(-1))


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "a.pth"
    model, _ = checkpoint(path, "wrn10_1", drop=("module.conv1.weight",))
    with pytest.raises(ValueError, match=r"no entry 'conv1\.weight'"):
        from_official(path, model)
    model, _ = checkpoint(path, "wrn10_1", extra={"module.fc.bias": torch.zeros(10)}.items())
    with pytest.raises(ValueError, match=r"no place for: fc\.bias"):
        from_official(path, model)
    model, _ = checkpoint(path, "wrn10_1", extra={"module.conv1.weight": torch.zeros(16, 3, 5, 5)}.items())
    with pytest.raises(ValueError, match=r"conv1\.weight does not fit; expected \(3, 3, 3, 16\).*\(5, 5, 3, 16\)"):
        from_official(path, model)
    with pytest.raises(ValueError, match="no such checkpoint"):
        from_official(tmp_path / "none.pth", model)
    (tmp_path / "broken.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"broken\.pth"):
        from_official(tmp_path / "broken.pth", model)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    import pickle

    class Code:
        def __reduce__(self):
            return (print, ("this must not run",))

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"code\.pth"):
        from_official(tmp_path / "code.pth", ModelSpec("wrn10_1", 10, (0.5,), (0.5,)).make())


def test_what_people_save_beside_tensors_and_instead_of_them_is_read(tmp_path):
    """Numbers of NumPy beside the network; parameters and half precision in it."""
    path = tmp_path / "a.pth"
    model, entries = checkpoint(path, "wrn10_1")
    name = "module.conv1.weight"
    kept = {**entries, name: torch.nn.Parameter(entries[name].bfloat16()), "module.bn1.num_batches_tracked": 3}
    kept["module.fc.weight"] = entries["module.fc.weight"].half()
    torch.save({"state_dict": kept, "best": np.float64(0.5), "epoch": np.int64(3), "args": {"lr": 0.1}}, path)
    variables = from_official(path, model)
    first = np.asarray(variables["params"]["conv1"]["kernel"])
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first.transpose(3, 2, 0, 1), entries[name].bfloat16().float().numpy())
    assert variables["params"]["fc"]["kernel"].dtype == np.float16
    torch.save(kept, path, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    np.testing.assert_array_equal(from_official(path, model)["params"]["conv1"]["kernel"], first)


ENTRIES = {
    "text": ("weights", "conv1.weight as a tensor; it is of str"),
    "an array": (np.zeros(3), "plain values"),
    "whole numbers": (torch.zeros(16, 3, 3, 3, dtype=torch.int32), "as floats; it is torch.int32"),
    "a sparse tensor": (torch.zeros(16, 3, 3, 3).to_sparse(), "as floats; it is torch.float32, torch.sparse_coo"),
    "no numbers": (torch.zeros(16, 3, 3, 3, device="meta"), "as floats|plain values"),
    "what is not finite": (torch.full((16, 3, 3, 3), float("nan")), "conv1.weight is not finite"),
    "a huge view of one number": (torch.zeros(1).expand(2**40), "does not fit"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:Sparse invariant")
@pytest.mark.parametrize(("value", "words"), ENTRIES.values(), ids=ENTRIES)
def test_what_is_no_weight_is_refused_in_a_sentence(tmp_path, value, words):
    model, _ = checkpoint(tmp_path / "a.pth", "wrn10_1", extra={"module.conv1.weight": value}.items())
    with pytest.raises(ValueError, match=rf"a\.pth: .*({words})") as error:
        from_official(tmp_path / "a.pth", model)
    assert len(str(error.value).splitlines()) == 1


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "a.pth"
    model, entries = checkpoint(path, "wrn10_1")
    whole = path.read_bytes()
    for place in range(whole.index(entries["module.fc.weight"].numpy().tobytes()), len(whole), 4099)[:20]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.pth: expected a PyTorch checkpoint"):
            from_official(path, model)


def test_what_would_unpack_to_far_more_than_it_is_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("a/data.pkl", bytes(2**20))
        with file.open("a/data/0", "w") as member:
            for _ in range(80):
                member.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"a\.pth: .*declare 2 entries of 84,934,656 bytes"):
        from_official(tmp_path / "a.pth", ModelSpec("wrn10_1", 10, (0.5,), (0.5,)).make())
