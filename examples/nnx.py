"""Flax nnx: a module trained in place through rank-4 steps, batch norm included.

python examples/nnx.py
"""

from needs import extra

with extra("examples", __name__):
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from sklearn.datasets import load_digits

    from raclora_jax import flax as rl_flax


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target
train, test = np.arange(1500), slice(1500, None)


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


model = Net(nnx.Rngs(0))  # or a module with your own weights
trainer = rl_flax.Trainer(
    loss_fn, model, images[:64], labels[:64], rank=4, learning_rate=1e-2, key=1
)
print(trainer.summary())
optimizer = trainer.init(model)

rng = np.random.default_rng(0)
for _ in range(400):
    batch = rng.choice(train, 64)
    loss = trainer.step(model, optimizer, images[batch], labels[batch])

model.eval()
hits = jax.jit(model.__call__)(images[test]).argmax(-1) == labels[test]
print(f"test accuracy: {np.mean(hits):.3f}")
