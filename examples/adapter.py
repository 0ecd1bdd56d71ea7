"""Adapter form: a frozen base, a small trained tree, merged at the end of each link.

python examples/adapter.py
"""

from needs import extra

with extra("examples", __name__):
    import jax
    import numpy as np
    import optax
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    import raclora_jax as rl

digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target
train, test = np.arange(1500), slice(1500, None)


def predict(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params):
    return np.mean(predict(params, 1 - images[test]).argmax(-1) == labels[test])


# The base learned dark digits on white in scikit-learn; the task is white on dark.
base = MLPClassifier((128,), tol=1e-3, random_state=0)
base.fit(images[train], labels[train])
leaves = map(np.float32, base.coefs_ + base.intercepts_)
base_params = dict(zip(("w1", "w2", "b1", "b2"), leaves, strict=True))
print(f"before: {accuracy(base_params):.3f}")

spec = rl.Spec(rank=4)
factors, chain = rl.init_adapter(base_params, spec, key=1)
tx = optax.adam(1e-2)
opt_state = tx.init(factors)
grad_fn = jax.jit(jax.grad(rl.adapted(loss_fn, spec)))
next_link = jax.jit(rl.next_link, static_argnames="spec")

rng = np.random.default_rng(0)
for _ in range(16):  # links
    for _ in range(spec.resample_every):
        batch = rng.choice(train, 64)
        grads = grad_fn(factors, base_params, chain, 1 - images[batch], labels[batch])
        updates, opt_state = tx.update(grads, opt_state, factors)
        factors = optax.apply_updates(factors, updates)
    base_params, factors, chain = next_link(base_params, factors, chain, spec)
    opt_state = rl.reset_moments(opt_state, tx, factors)
print(f"after: {accuracy(base_params):.3f}")

# The export is the base's own tree: nothing of the chain is left to load.
np.savez("digits.npz", **base_params)
