"""Somebody's network: what it may give, what it may keep, and that nothing of it is spoilt."""

from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import rst_jax
from rst_jax.evaluation.classifier import of_function

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.1, 0.9, (12, 5, 5, 1)).astype(np.float32)
W = RNG.normal(size=(25, 4)).astype(np.float32)
EPS = rst_jax.ThreatModel(0.02)


def plain(x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ W


LABELS = np.argmax(plain(IMAGES), -1)


def evaluate(logits_fn, attacks="fgsm"):
    return rst_jax.evaluate(logits_fn, IMAGES, LABELS, EPS, attacks, batch_size=4)


class OwnKey:
    """Splits a key that it keeps, new or old in kind."""

    def __init__(self, key, size=0.1):
        self.key, self.size = key, size

    def __call__(self, x):
        self.key, key = jax.random.split(self.key)
        return plain(x) + self.size * jax.random.normal(key, (x.shape[0], 4))


class Compiled(OwnKey):
    """The same in a compiled function, which leaves a tracer behind when it is first called."""

    def __init__(self):
        super().__init__(jax.random.key(0))
        self.compiled = jax.jit(super().__call__)

    def __call__(self, x):
        return self.compiled(x)


class Stores:
    def __call__(self, x):
        self.hidden = plain(x)
        return self.hidden


class History(list):
    def __call__(self, x):
        self.append(x)
        return plain(x)


class Updates:
    mean = jnp.zeros(4)

    def __call__(self, x):
        self.mean = 0.9 * self.mean + 0.1 * plain(x).mean(0)
        return plain(x)


class Module(nnx.Module):
    def __init__(self, last):
        self.first, self.last = nnx.Linear(25, 4, rngs=nnx.Rngs(0)), last

    def __call__(self, x):
        return self.last(self.first(x.reshape(x.shape[0], -1)))


def held_by_a_closure():
    keys = [jax.random.key(0)]

    def noisy(x):
        keys[0], key = jax.random.split(keys[0])
        return plain(x) + jax.random.normal(key, (x.shape[0], 4))

    return noisy


KEEPING = {
    "key": lambda: OwnKey(jax.random.key(0)),
    "old key": lambda: OwnKey(jax.random.PRNGKey(0)),
    "key without effect": lambda: OwnKey(jax.random.key(0), 0.0),
    "closure": held_by_a_closure,
    "compiled": Compiled,
    "stores": Stores,
    "history": History,
    "updates": Updates,
    "nnx dropout": lambda: Module(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
    "nnx batch norm": lambda: Module(nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", KEEPING)
def test_a_network_that_keeps_arrays_is_a_sentence(name):
    network = KEEPING[name]()
    for _ in range(2):  # as often as it is asked
        with pytest.raises(ValueError, match=r"keeps arrays from call to call .* so it is no function of the im"):
            evaluate(network)
    if name != "compiled":  # this one has spoilt itself before it was given
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(vars(network)))
        assert network(IMAGES).shape == (12, 4)


def test_keys_go_on_as_if_they_had_been_split_by_hand():
    network, key = OwnKey(jax.random.key(5)), jax.random.key(5)
    with pytest.raises(ValueError, match="keeps arrays"):
        evaluate(network)
    followed = []
    for _ in range(9):
        key, _ = jax.random.split(key)
        followed.append(jax.random.key_data(key).tolist())
    assert jax.random.key_data(network.key).tolist() in followed


class Counts:
    """Keeps numbers and arrays, but other ones never."""

    calls, key = 0, jax.random.key(0)

    def __call__(self, x):
        self.calls += 1
        return plain(x) * jax.random.uniform(self.key, minval=1.0, maxval=1.0)


def compiled_anew(x):
    return jax.jit(lambda y: (y.reshape(y.shape[0], -1) - 0.5) @ W)(x)


MODULES = [Module(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), Module(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))]
for module in MODULES:
    module.eval()


@pytest.mark.parametrize("network", [plain, jax.jit(plain), compiled_anew, Counts(), *MODULES])
def test_a_network_that_keeps_none_is_traced(network):
    classifier = of_function(network, IMAGES[:2])
    assert (classifier.traced, classifier.obstacle, classifier.classes) == (True, "", 4)


def test_a_random_network_of_its_own_numbers_has_a_verdict():
    class Dropout(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x.reshape(x.shape[0], -1)))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    bound = Dropout().bind(Dropout().init(keys, IMAGES), rngs={"dropout": jax.random.key(2)})
    assert evaluate(bound).record.verdict.startswith("invalid: logits of the same images again differ")


Output = namedtuple("Output", "hidden logits")
TORCH = torch.nn.Linear(25, 4)


def of_torch(x):
    return TORCH(torch.from_numpy(np.array(x)).reshape(len(x), -1))


@pytest.mark.parametrize(
    ("logits_fn", "words"),
    [
        (lambda x: (plain(x), x), r"it gave a tuple of \w+, \w+\. Give lambda x: logits_fn\(x\)\[0\] or"),
        (lambda x: (x, plain(x)), r"logits_fn\(x\)\[1\]"),
        (lambda x: Output(x, plain(x)), r"it gave a \w+\.Output of .*logits_fn\(x\)\[1\]"),
        (lambda x: [plain(x)], r"it gave a list of .*logits_fn\(x\)\[0\]"),
        (
            lambda x: np.asarray(plain(x)).tolist(),
            r"a list of list.*np\.asarray\(logits_fn\(x\), np\.float32\)",
        ),
        (lambda x: [[1.0], [1.0, 2.0]], "it gave a list of list"),
        (lambda x: (), "it gave a tuple of nothing"),
        (lambda x: {"logits": plain(x)}, r"it gave a dict with 'logits'\. Give lambda x: logits_fn\(x\)\['logits'\]"),
        (lambda x: {"loss": 0.0, "out": plain(x)}, r"logits_fn\(x\)\['out'\]"),
        (lambda x: {}, "it gave a dict with nothing"),
        (lambda x: None, "it gave None"),
        (lambda x: "logits", "it gave an object of type str"),
        (lambda x: object(), "it gave an object of type object"),
        (
            of_torch,
            r"type torch\.Tensor, which NumPy cannot read .*requires grad.*logits\.detach\(\)\.cpu\(\)",
        ),
        (lambda x: of_torch(x).detach().bfloat16(), r"type torch\.Tensor, which NumPy cannot read"),
        (lambda x: plain(x)[:, :1], r"logits \[N, classes\], at least two; .* it gave \[2, 1\]"),
        (lambda x: plain(x)[:1], r"it gave \[1, 4\]"),
        (lambda x: plain(x).astype(np.int32), "must give floats; got int32"),
        (lambda x: plain(x) + 0j, "must give floats; got complex"),
        (3, "a function of images, or a ticket; got an object of type int"),
        (None, "got None"),
        (nn.Dense(4), r"got an object of type flax\.Dense\. Of a Flax module give lambda x: module\.apply"),
    ],
)
def test_what_gives_no_logits_is_named(logits_fn, words):
    with pytest.raises(ValueError, match=words) as error:
        evaluate(logits_fn)
    assert "\n" not in str(error.value)


def test_another_librarys_network_is_called_with_its_arrays():
    classifier = of_function(lambda x: of_torch(x).detach(), IMAGES[:2])
    assert not classifier.traced
    assert classifier.obstacle
    logits = of_torch(IMAGES).detach().numpy()
    np.testing.assert_array_equal(classifier.raw(IMAGES), logits)
    np.testing.assert_array_equal(jax.jit(classifier.apply)((), IMAGES), logits)
