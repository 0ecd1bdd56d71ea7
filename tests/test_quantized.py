"""Merging into codes: nothing that a link learnt is lost, and what is held is said."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses, with_repeats
from jax.sharding import NamedSharding, PartitionSpec

import raclora_jax as rl

qwix = pytest.importorskip("qwix")
quantized = pytest.importorskip("raclora_jax.quantized")

# tall has its columns drawn, wide its rows, stack its rows in each of three matrices.
SPEC = rl.Spec(
    3,
    rules=[
        rl.Rule("stack", batch=(0,), rows=(1,)),
        rl.Rule("head", mode="frozen"),
    ],
)
KINDS = [("int8", 5), ("int4", 5), ("nf4", None)]


def params(seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    shapes = {
        "tall": (25, 10),
        "wide": (10, 30),
        "stack": (3, 10, 15),
        "head": (10, 5),
        "bias": (7,),
    }
    return {name: jnp.asarray(draw.normal(size=s), dtype) for name, s in shapes.items()}


def lifted(path, factor, sketch):
    """What a factor adds, in NumPy: factor and sketch have their rank axis first."""
    word = {"tall": "ri,rj->ij", "wide": "rj,ri->ij", "stack": "brj,bri->bij"}[path]
    return np.einsum(word, np.float64(factor), np.float64(sketch))


def toward(path, target, sketch):
    """The factor that takes a link as far towards a target as its sketch can."""
    word = {"tall": "ij,rj->ri", "wide": "ij,ri->rj", "stack": "bij,bri->brj"}[path]
    return jnp.asarray(np.einsum(word, target, np.float64(sketch)), jnp.float32)


def spread(scale, shape):
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return scale


def step_of(leaf):
    """The distance between codes, the largest one where it varies."""
    gap = 1.0 - 0.6961928 if leaf.qtype == "nf4" else 1.0
    return gap * spread(np.float64(leaf.scale), leaf.shape)


def start(kind, block, dtype=jnp.float32):
    base, error = quantized.quantize(params(dtype=dtype), SPEC, kind, block=block)
    factors, chain = rl.init_adapter(base, SPEC, key=1)
    return base, error, factors, chain


NEXT = jax.jit(quantized.next_link, static_argnames="spec")


def small_steps(links, kind, block=None, *, carry=True, rate=0.02, dtype=jnp.float32):
    """Links of small steps, and in float64 what they add up to."""
    base, error, factors, chain = start(kind, block, dtype)
    target = {path: rate * step_of(base[path]) for path in ("tall", "wide", "stack")}
    exact = {path: np.float64(params(dtype=dtype)[path]) for path in target}
    for _ in range(links):
        for path in target:
            factors[path] = toward(path, target[path], chain.sketches[path])
            exact[path] += lifted(path, factors[path], chain.sketches[path])
        if carry:
            base, error, factors, chain = NEXT(base, error, factors, chain, SPEC)
        else:
            base, factors, chain = rounded_link(base, factors, chain)
    return base, error, exact


@jax.jit
def rounded_link(base, factors, chain):
    """The same link, its sum rounded to the nearest codes and the rest let go."""
    total = rl.effective_params(base, factors, chain, SPEC, dequantize=qwix.dequantize)
    empty = quantized.zero_error(base, SPEC)
    merged, _, factors, chain = quantized.next_link(base, empty, factors, chain, SPEC)
    for path in ("tall", "wide", "stack"):
        old = base[path]
        tiles = {
            axis: size // old.scale.shape[axis] for axis, size in enumerate(old.shape)
        }
        merged[path] = qwix.quantize(total[path], old.qtype, tiled_axes=tiles)
    return merged, factors, chain


@pytest.mark.parametrize(
    ("kind", "block"), with_repeats(KINDS, ("int8", 5), ("nf4", None))
)
def test_small_steps_add_up_over_200_merges(kind, block):
    links, rate = 200, 0.02
    base, error, exact = small_steps(links, kind, block, rate=rate)
    known = quantized.exact_params(base, error)
    for path, want in exact.items():
        step = step_of(base[path])
        off = np.abs(np.float64(qwix.dequantize(base[path])) - want) / step
        assert off.mean() < 1, path
        # A carried error is off by less than its own unit at each merge, on average by
        # nothing: a walk of `links` such steps, each of variance at most a quarter.
        unit = spread(np.float64(error[path].scale), want.shape)
        walk = (np.float64(known[path]) - want) / unit
        assert np.abs(walk).max() < 6 * np.sqrt(links / 4)
        assert abs(walk.mean()) < 6 * np.sqrt(links / 4 / walk.size)


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_without_the_carried_error_they_vanish(kind, block):
    base, _, exact = small_steps(200, kind, block, carry=False)
    for path, want in exact.items():
        step = step_of(base[path])
        off = np.abs(np.float64(qwix.dequantize(base[path])) - want) / step
        moved = np.abs(want - np.float64(params()[path])) / step
        assert off.mean() > 0.7 * moved.mean(), path


def test_rounding_again_and_again_moves_the_ends_of_int8():
    """127 steps, or 128, stand for 127.5, and the next scale is made of them."""
    rounded, _, exact = small_steps(60, "int8", carry=False, rate=0.0)
    kept, _, _ = small_steps(60, "int8", rate=0.0)
    for path, want in exact.items():
        largest = np.abs(want).max(axis=-2)
        ends = np.abs(qwix.dequantize(rounded[path])).max(axis=-2) / largest
        assert np.abs(ends - 1).max() > 0.1
        off = np.abs(np.float64(qwix.dequantize(kept[path])) - want)
        assert (off < 0.55 * step_of(kept[path])).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_16_bits_keep_the_books(dtype):
    """Compiled, where a cast there and back may be left out."""
    links = 60
    base, error, exact = small_steps(links, "nf4", dtype=dtype)
    known = quantized.exact_params(base, error)
    for path, want in exact.items():
        assert base[path].dtype == dtype
        assert known[path].dtype == jnp.float32
        unit = spread(np.float64(error[path].scale), want.shape)
        walk = (np.float64(known[path]) - want) / unit
        assert np.abs(walk).max() < 6 * np.sqrt(links / 4)


def test_a_carried_error_is_right_on_average():
    base, error, factors, _ = start("nf4", None)
    factors["tall"] += 0.01

    @jax.jit
    @jax.vmap
    def carried(seed):
        _, chain = rl.init_adapter(base, SPEC, key=jax.random.key(7))
        keys = jax.random.key_data(jax.random.key(seed))
        chain = chain._replace(key_data=keys)
        new, left = quantized.merge(base, error, factors, chain, SPEC)
        return quantized.exact_params(new, left)["tall"], left["tall"].scale

    draws = 400
    got, units = carried(jnp.arange(draws, dtype=jnp.uint32))
    _, chain = rl.init_adapter(base, SPEC, key=7)
    want = np.float64(quantized.exact_params(base, error)["tall"])
    want += lifted("tall", factors["tall"], chain.sketches["tall"])
    unit = spread(np.float64(units[0]), want.shape)
    off = (np.float64(got).mean(0) - want) / unit
    assert np.abs(off).max() < 6 * 0.5 / np.sqrt(draws)
    assert np.abs((np.float64(got[0]) - want) / unit).max() > 0.5  # one draw is not


def test_other_leaves_are_merged_as_ever():
    base, error, factors, chain = start("int8", None)
    base["head"] = qwix.quantize(base["head"], "nf4")
    factors["bias"] += 0.25
    plain = rl.next_link(params(), factors, chain, SPEC)
    merged, left, zeros, following = quantized.next_link(
        base, error, factors, chain, SPEC
    )
    np.testing.assert_array_equal(merged["bias"], plain[0]["bias"])
    assert merged["head"] is base["head"]
    assert isinstance(left["bias"], optax.MaskedNode)
    assert isinstance(left["head"], optax.MaskedNode)
    for got, want in zip(
        jax.tree.leaves((zeros, following)), jax.tree.leaves(plain[1:]), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_link_leaves_types_and_shapes_alone():
    for kind, block in KINDS:
        base, error, factors, chain = start(kind, block)
        after = jax.eval_shape(
            lambda *run: quantized.next_link(*run, SPEC), base, error, factors, chain
        )
        before = jax.eval_shape(lambda *run: run, base, error, factors, chain)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert jax.tree.leaves(after) == jax.tree.leaves(before)


def test_an_asymmetric_base_stays_so():
    base = {
        "kernel": qwix.quantize(params()["tall"] + 3, "int8", calibration_method="minmax")
    }
    error = quantized.zero_error(base, 3)
    factors, chain = rl.init_adapter(base, 3, key=0)
    new, left = quantized.merge(base, error, factors, chain, 3)
    assert new["kernel"].zero_point.dtype == jnp.int8
    want = np.float64(qwix.dequantize(base["kernel"]))
    got = np.float64(quantized.exact_params(new, left)["kernel"])
    assert np.abs(got - want).max() < 1.01 * float(left["kernel"].scale.max())


def test_a_number_that_is_not_finite_shows():
    base, error, factors, chain = start("nf4", None)
    factors["tall"] = factors["tall"].at[0, 4].set(jnp.nan)
    merged, _ = quantized.merge(base, error, factors, chain, SPEC)
    assert np.isnan(qwix.dequantize(merged["tall"])).any()
    assert np.isfinite(qwix.dequantize(merged["wide"])).all()


def test_a_quantised_base_is_tuned():
    draw = np.random.default_rng(0)
    hidden, wish = draw.normal(size=(2, 24, 10)) / 5
    x = jnp.asarray(draw.normal(size=(64, 24)), jnp.float32)
    y = x @ jnp.asarray(hidden + 0.3 * wish, jnp.float32)

    def loss_fn(params):
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    start = {"kernel": jnp.asarray(hidden, jnp.float32)}
    base, error = quantized.quantize(start, 2, "int8")
    spec = rl.Spec(2, side="smaller")
    factors, chain = rl.init_adapter(base, spec, key=0)
    grad_fn = jax.jit(jax.grad(rl.adapted(loss_fn, spec, dequantize=qwix.dequantize)))
    following = jax.jit(lambda *run: quantized.next_link(*run, spec))
    for _ in range(60):
        for _ in range(4):
            grads = grad_fn(factors, base, chain)
            factors = jax.tree.map(lambda f, g: f - 1.0 * g, factors, grads)
        base, error, factors, chain = following(base, error, factors, chain)
    tuned = quantized.exact_params(base, error)
    assert loss_fn(tuned) < 0.02 * loss_fn(start)
    assert loss_fn({"kernel": qwix.dequantize(base["kernel"])}) < 0.02 * loss_fn(start)


def test_devices_see_the_same_link():
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])
    base, error, factors, chain = start("int8", None)
    factors["wide"] += 0.02
    whole = NEXT(base, error, factors, chain, SPEC)

    def shard(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, "a")))

    base = base | {"wide": jax.tree.map(shard, base["wide"])}
    error = error | {"wide": jax.tree.map(shard, error["wide"])}
    parts = NEXT(base, error, factors, chain, SPEC)
    np.testing.assert_array_equal(parts[0]["wide"].qvalue, whole[0]["wide"].qvalue)
    np.testing.assert_array_equal(parts[1]["wide"].qvalue, whole[1]["wide"].qvalue)


def test_bytes_are_those_of_the_buffers():
    base, error, factors, _ = start("nf4", None)
    said = quantized.held(base, error, factors)

    def buffers(tree):
        return sum(
            shard.data.on_device_size_in_bytes()
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
        )

    assert said == (buffers(base), buffers(error), buffers(factors))
    codes = sum(base[path].qvalue.size for path in ("tall", "wide", "stack"))
    assert said.error == codes + 4 * sum(
        error[path].scale.size for path in ("tall", "wide", "stack")
    )
    assert said.base >= codes / 2


def without(tree, path):
    return {name: leaf for name, leaf in tree.items() if name != path}


BAD = {
    "an unknown type": (
        lambda: quantized.quantize(params(), SPEC, "int3"),
        ["'int3'", "nf4"],
    ),
    "a block that divides nothing": (
        lambda: quantized.quantize(params(), SPEC, "nf4", block=4),
        ["'stack'", "(3, 10, 15)", "block of 4", "divide 10"],
    ),
    "a block of zero": (
        lambda: quantized.quantize(params(), SPEC, "nf4", block=0),
        ["block", "0"],
    ),
    "a block that is no int": (
        lambda: quantized.quantize(params(), SPEC, "nf4", block=5.0),
        ["block must be an int", "5.0"],
    ),
    "bytes of what has none": (
        lambda: quantized.held(jax.eval_shape(params), None, None),
        ["'bias'", "array on a device", "ShapeDtypeStruct"],
    ),
    "a leaf that is quantised": (
        lambda: quantized.quantize(start("nf4", None)[0], SPEC, "nf4"),
        ["quantised already", "nf4", "zero_error"],
    ),
    "no adapted leaf": (
        lambda: quantized.quantize(
            params(), rl.Spec(3, rules=[rl.Rule(".*", mode="frozen")]), "nf4"
        ),
        ["no leaf is adapted"],
    ),
    "a weight that is not finite": (
        lambda: quantized.quantize(
            params() | {"wide": jnp.full((10, 30), jnp.inf)}, SPEC, "nf4"
        ),
        ["'wide'", "not finite"],
    ),
    "an error that is missing": (
        lambda: merge(error=without(start("int8", None)[1], "tall")),
        ["'tall'", "no error", "zero_error"],
    ),
    "an error of other weights": (
        lambda: merge(
            error=start("int8", None)[1] | {"tall": start("int8", 5)[1]["tall"]}
        ),
        ["'tall'", "(1, 10)", "(5, 10)"],
    ),
    "an error of no leaf": (
        lambda: merge(
            error=start("int8", None)[1] | {"new": start("int8", 5)[1]["tall"]}
        ),
        ["'new'", "no quantised leaf"],
    ),
    "an error that is an array": (
        lambda: merge(error=start("int8", None)[1] | {"tall": jnp.zeros((25, 10))}),
        ["'tall'", "quantize"],
    ),
    "a merge that knows no errors": (
        lambda: rl.merge(*(start("int8", None)[i] for i in (0, 2, 3)), SPEC),
        ["quantised", "raclora_jax.quantized"],
    ),
}


def merge(error):
    base, _, factors, chain = start("int8", None)
    return quantized.merge(base, error, factors, chain, SPEC)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    refuses(call, *words)


def test_weights_that_a_trace_closes_over():
    """They are numbers, and are judged as such, inside of somebody's jit too."""
    weights = params()
    want = quantized.exact_params(*quantized.quantize(weights, SPEC, "int8"))
    got = jax.jit(
        lambda: quantized.exact_params(*quantized.quantize(weights, SPEC, "int8"))
    )()
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-6)
    weights["tall"] = weights["tall"].at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'tall'.*not finite"):
        jax.jit(lambda: quantized.quantize(weights, SPEC, "int8"))()


def test_without_qwix_the_extra_is_named():
    code = "import sys; sys.modules['qwix'] = None; import raclora_jax.quantized"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'raclora-jax[quantized]'" in done.stderr
