"""Flax linen: a convolutional net learns handwritten digits through rank-4 steps.

python examples/linen.py
"""

from needs import extra

with extra("examples", __name__):
    import jax
    import numpy as np
    import optax
    from flax import linen as nn
    from sklearn.datasets import load_digits

    import raclora_jax as rl
    from raclora_jax.flax import TrainState


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = Net()
digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target
train, test = np.arange(1500), slice(1500, None)


def loss_fn(params, x, y):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = model.init(jax.random.key(0), images[:1])["params"]  # or your own weights
trainer = rl.Trainer(
    loss_fn, params, images[:64], labels[:64], rank=4, learning_rate=1e-2, key=1
)
print(trainer.summary())
state = TrainState.create(apply_fn=model.apply, params=params, tx=trainer.tx)

rng = np.random.default_rng(0)
for i in range(400):
    batch = rng.choice(train, 64)
    state, loss = state.train_step(trainer, images[batch], labels[batch])
    if i % 100 == 99:
        print(f"step {i + 1}: loss {loss:.3f}")

logits = model.apply({"params": state.params}, images[test])
print(f"test accuracy: {np.mean(logits.argmax(-1) == labels[test]):.3f}")
