"""Every model of the benchmarks: gradients in factor coordinates, views read off."""

import warnings

import agreement
import jax
import pytest
from helpers import with_repeats

import raclora_jax as rl
from benchmarks.shared import models

TINY = {"width": 64, "layers": 2, "vocab": 48, "sequences": 2, "length": 12}
MODELS = {
    "decoder": lambda: models.decoder(**TINY),
    "decoder, scan": lambda: models.decoder(**TINY, scan=True),
    "decoder, scan, remat": lambda: models.decoder(**TINY, scan=True, remat=True),
    "encoder": lambda: models.encoder(**TINY),
    "conv net": lambda: models.conv_net(width=16, stages=2, side=8, samples=2),
    "mlp": lambda: models.mlp(width=24, layers=2, samples=6),
}


@pytest.mark.parametrize("name", with_repeats(MODELS, "decoder", "decoder, scan"))
def test_gradients_are_the_dense_ones_projected(name):
    model = MODELS[name]()
    params = jax.jit(model.init)(jax.random.key(0))
    batch = jax.jit(model.batch)(jax.random.key(1))
    specs = [
        rl.trace_spec(model.loss, params, batch, rank=3, side=side)
        for side in ("left", "right")
    ]

    def both(params, batch):
        value, dense = jax.value_and_grad(model.loss)(params, batch)
        pairs = []
        for spec in specs:
            state = rl.raclora(0.1, spec, key=0).init(params)
            ours = rl.value_and_grad(model.loss, spec)(params, state, batch)
            sketches = rl.sample_sketch(params, spec, key=0)
            pairs.append((ours, rl.project(dense, sketches, spec)))
        return value, pairs

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, pairs = jax.jit(both)(params, batch)
    for (loss, ours), expected in pairs:
        assert float(loss) == pytest.approx(float(value), rel=1e-5)
        agreement.assert_same(ours, expected, 1e-5, name)
