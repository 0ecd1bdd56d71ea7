"""Drop-in: one line of an optax loop changes, and its gradients stay dense.

python examples/dropin.py
"""

from needs import extra

with extra("examples", __name__):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from sklearn.datasets import load_digits

    import raclora_jax as rl

digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target
train, test = np.arange(1500), slice(1500, None)


def predict(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, x, y):
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def dense(key, rows, cols):
    kernel = jax.random.normal(key, (rows, cols)) / jnp.sqrt(rows)
    return {"kernel": kernel, "bias": jnp.zeros(cols)}


keys = jax.random.split(jax.random.key(0))
params = {"hidden": dense(keys[0], 64, 128), "head": dense(keys[1], 128, 10)}

schedule = optax.cosine_decay_schedule(2e-2, 400)
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    rl.raclora(schedule, rl.Spec(rank=4), weight_decay=1e-4, key=1),  # was: adamw
)
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


rng = np.random.default_rng(0)
for _ in range(400):
    batch = rng.choice(train, 64)
    params, opt_state, loss = step(params, opt_state, images[batch], labels[batch])

hits = predict(params, images[test]).argmax(-1) == labels[test]
print(f"test accuracy: {np.mean(hits):.3f}")
