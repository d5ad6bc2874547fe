"""Evaluate somebody's classifier: two functions from images to logits, one of JAX and one of another library.

    python examples/own_classifier.py

A linear classifier that scikit-learn has fitted, first as a JAX function (AutoAttack), then as scikit-learn's own,
which has no gradients for JAX (Square alone). Prints both cards; a quarter of a minute on two cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import rst_jax

EPS, N = 0.05, 100


def main() -> None:
    """Fit, wrap, evaluate."""
    bunch = load_digits()
    images, labels = (bunch.images[..., None] / 16).astype(np.float32), bunch.target
    test = np.arange(len(labels)) % 5 == 0
    fitted = LogisticRegression(C=0.1, max_iter=200).fit(images[~test].reshape(-1, 64), labels[~test])
    weights, bias = (jnp.asarray(a, jnp.float32) for a in (fitted.coef_.T, fitted.intercept_))

    def of_jax(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1) @ weights + bias

    def of_sklearn(x: np.ndarray) -> np.ndarray:
        return fitted.decision_function(np.asarray(x).reshape(len(x), -1)).astype(np.float32)

    threat, few = rst_jax.ThreatModel(EPS), (images[test][:N], labels[test][:N])
    print(rst_jax.evaluate(of_jax, *few, threat, subject="logistic regression in JAX", dataset="digits"))
    print()
    print(rst_jax.evaluate(of_sklearn, *few, threat, attacks="square", subject="scikit-learn's", dataset="digits"))


if __name__ == "__main__":
    main()
