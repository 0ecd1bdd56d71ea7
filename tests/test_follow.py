"""Followers: equal to the bit by messages, and nothing wrong is taken in silently."""

import dataclasses
import functools
import hashlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same_bits, refuses, repeat
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from raclora_jax import follow
from raclora_jax.checkpoint import Checkpointer
from raclora_jax.follow._exact import moved_by_factor
from raclora_jax.follow._message import Message
from raclora_jax.follow._numbers import packed

RULES = [rl.Rule("stack", batch=0)]
LAWS = ["orthonormal", "rademacher", "gaussian_raw", "coordinate", "block"]


def spec_of(**given):
    return rl.Spec(2, **{"resample_every": 3, "side": "left", "rules": RULES, **given})


def params_of(dtype="float32"):
    shapes = {"kernel": (12, 8), "stack": (4, 12, 6), "bias": (8,)}
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss_fn(params, x):
    wide = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
    y = x @ wide["kernel"] + wide["bias"]
    z = jnp.einsum("bi,sio->bso", x, wide["stack"])
    return jnp.mean((y - 1) ** 2) + jnp.mean((z - 2) ** 2)


@functools.cache
def trainer_of(spec, weight_decay=0.0):
    """A compiled ``(params, state, x) -> (updates, state)``, and the ``init``."""
    inner = optax.trace(0.9)
    tx = rl.raclora(0.05, spec, inner=inner, weight_decay=weight_decay, key=3)
    grad_fn = rl.grad(loss_fn, spec)

    @jax.jit
    def step(params, state, x):
        return tx.update(grad_fn(params, state, x), state, params)

    return step, tx.init


def batches(steps):
    keys = jax.random.split(jax.random.key(1), 8)
    return [jax.random.normal(key, (5, 12)) for key in keys[:steps]]


def messages_of(spec, params, steps, *, numbers="float32", weight_decay=0.0):
    """What a trainer sends, with its weights after each message."""
    step, init = trainer_of(spec, weight_decay)
    state, position = init(params), follow.start(params, key=3)
    sent = []
    for x in batches(steps):
        updates, state = step(params, state, x)
        message = follow.encode(
            params, updates, state, position, numbers=numbers, digest_every=2
        )
        params, position = follow.apply(params, message, position)
        sent.append((message, params, position))
    return sent


def follows(base, sent):
    """Weights and position of one who applies all messages, equal after each."""
    position = follow.start(base, key=3)
    for message, weights, where in sent:
        base, position = follow.apply(base, message, position)
        assert_same_bits(jax.device_get(base), jax.device_get(weights))
        assert position == where
    return base, position


@pytest.mark.parametrize(
    ("law", "dtype"),
    [
        ("orthonormal", "float32"),
        ("rademacher", "bfloat16"),
        ("coordinate", "bfloat16"),
        ("block", "float32"),
        *itertools.starmap(repeat, itertools.product(LAWS, ["float16"])),
    ],
)
def test_equal_to_the_bit_in_every_law(law, dtype):
    side = "right" if law in ("coordinate", "orthonormal") else "left"
    spec, base = spec_of(sketch=law, side=side), params_of(dtype)
    sent = messages_of(spec, base, 4, weight_decay=0.1 if law == "rademacher" else 0.0)
    moved, _ = follows(jax.device_get(base), sent)
    assert not np.array_equal(moved["kernel"], base["kernel"])
    assert not np.array_equal(moved["bias"], base["bias"])


@pytest.mark.parametrize(
    ("law", "numbers"),
    [("block", "int8"), ("orthonormal", "bfloat16"), repeat("orthonormal", "int8")],
)
def test_fewer_bits_are_rounded_for_all_alike(law, numbers):
    base = params_of("bfloat16")
    sent = messages_of(spec_of(sketch=law), base, 4, numbers=numbers)
    follows(base, sent)
    whole = messages_of(spec_of(sketch=law), base, 1)
    assert len(sent[0][0]) < len(whole[0][0])


def test_a_drawn_side_and_decay():
    spec, base = spec_of(side=0.5), params_of("bfloat16")
    follows(base, messages_of(spec, base, 7, weight_decay=0.1, numbers="bfloat16"))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("law", ["orthonormal", "block"])
def test_the_step_is_that_of_apply_updates(law, decay):
    spec, params = spec_of(sketch=law, alpha=3.0), params_of()
    step, init = trainer_of(spec, decay)
    updates, state = step(params, init(params), batches(1)[0])
    position = follow.start(params, key=3)
    message = follow.encode(params, updates, state, position)
    moved, _ = follow.apply(params, message, position)
    assert_close(moved, rl.apply_updates(params, updates), 1e-6)


def test_the_arithmetic_is_the_one_that_is_written_down():
    """A sum in NumPy, which contracts nothing, in the same order gives the same bits."""
    rows, cols, rank = 9, 7, 19
    keys = jax.random.split(jax.random.key(0), 3)
    weight, sketch, factor = (
        np.asarray(jax.random.normal(key, shape))
        for key, shape in zip(
            keys, [(rows, cols), (rank, rows), (rank, cols)], strict=True
        )
    )
    plan = rl.plan(rl.Spec(2, side="left"), {"w": weight})["w"]
    plan = dataclasses.replace(plan, rank=rank)

    def halves(array):
        high = (array.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
        return high, array - high

    high = low = np.zeros((rows, cols), np.float32)
    for s, f in zip(sketch, factor, strict=True):
        (a, b), (c, d) = halves(s[:, None]), halves(f[None])
        high = high + a * c
        low = ((low + a * d) + b * c) + b * d
    found = moved_by_factor(weight, factor, None, sketch, None, None, plan)
    np.testing.assert_array_equal(found, weight + (high + low))
    decay = np.float32(0.3)
    (a, b), (c, d) = halves(np.full((1, 1), decay)), halves(weight)
    shrink = a * c + (a * d + (b * c + b * d))
    found = moved_by_factor(weight, factor, None, sketch, decay, None, plan)
    np.testing.assert_array_equal(found, weight + ((high + low) - shrink))


@pytest.mark.parametrize("numbers", ["bfloat16", "int8"])
def test_numbers_of_fewer_bits_are_right_on_average(numbers):
    plan = rl.plan(rl.Spec(2, side="left", alpha=3.0), {"w": jnp.zeros((6, 9))})["w"]
    value = jnp.linspace(-1, 0.5, 18).reshape(2, 9).at[1].multiply(1e-3)
    keys = jax.random.split(jax.random.key(0), 400)

    def sent(key):
        out = packed(value, key, plan, numbers)
        scales = 1 if out.scales is None else out.scales[:, None].astype(jnp.float32)
        return out.numbers.astype(jnp.float32) * scales

    drawn = np.asarray(jax.vmap(sent)(keys))
    exact = 1.5 * np.asarray(value)
    gap = np.abs(exact).max(1, keepdims=True) / (127 if numbers == "int8" else 100)
    assert (np.abs(drawn - exact) <= 1.05 * gap).all()
    # Five standard errors of a mean of 400 draws that are at most one gap wide.
    assert (np.abs(drawn.mean(0) - exact) <= 5 * gap / 2 / np.sqrt(400)).all()


def on_mesh(params, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind,) * 2)
    specs = {
        "kernel": PartitionSpec("a", "b"),
        "head": PartitionSpec("a", "b"),
        "stack": PartitionSpec("a", None, "b"),
        "bias": PartitionSpec("b"),
    }
    return {
        n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params.items()
    }


@pytest.mark.parametrize(
    ("law", "numbers", "dtype"),
    [
        repeat("orthonormal", "float32", "float32"),
        ("orthonormal", "int8", "bfloat16"),
        repeat("block", "int8", "float32"),
        ("block", "bfloat16", "bfloat16"),
    ],
)
def test_another_mesh_has_the_same_bits(law, numbers, dtype):
    """A trainer on (4, 2) and a follower on one device, and the reverse."""
    spec, base = spec_of(sketch=law), params_of(dtype)
    spread = on_mesh(base, AxisType.Auto)
    given = {"numbers": numbers, "weight_decay": 0.1}
    moved, _ = follows(base, messages_of(spec, spread, 4, **given))
    assert not np.array_equal(moved["kernel"], base["kernel"])
    moved, _ = follows(spread, messages_of(spec, base, 4, **given))
    for name, weight in moved.items():
        assert weight.sharding == spread[name].sharding


def test_an_explicit_mesh_has_the_same_bits():
    base = params_of("bfloat16")
    spread = on_mesh(base, AxisType.Explicit)
    for law, decay in (("orthonormal", 0.1), ("block", 0.0)):
        with jax.set_mesh(spread["bias"].sharding.mesh):
            sent = messages_of(
                spec_of(sketch=law), spread, 2, weight_decay=decay, numbers="int8"
            )
            moved, _ = follows(spread, sent)
        follows(base, sent)
        assert moved["stack"].sharding == spread["stack"].sharding


def scanned(params, x):
    def layer(x, own):
        return x + jnp.tanh(x @ own.astype(jnp.float32)), None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    y = x @ params["head"].astype(jnp.float32) + params["bias"]
    return jnp.mean((y - 1) ** 2)


@pytest.mark.parametrize(
    ("dtype", "law", "spread"),
    [
        ("bfloat16", "block", True),
        repeat("float32", "block", False),
        repeat("float32", "coordinate", True),
    ],
)
def test_a_fused_step_sends_the_rows_that_changed(dtype, law, spread):
    keys = jax.random.split(jax.random.key(0), 2)
    base = {
        "stack": jax.random.normal(keys[0], (4, 12, 12)) / 4,
        "head": jax.random.normal(keys[1], (12, 6)),
        "bias": jnp.zeros(6),
    }
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), base)
    alone, x = base, batches(1)[0]
    if spread:
        base = on_mesh(base, AxisType.Auto)
    spec = rl.trace_spec(scanned, base, x, rank=4, sketch=law, resample_every=1)
    inner = rl.orthogonal() if law == "block" else optax.scale_by_adam()
    tx = rl.raclora(0.05, spec, inner=inner, key=3)
    step = jax.jit(rl.fused_step(scanned, tx))
    params, state, position = base, tx.init(base), follow.start(base, key=3)
    sent = []
    for x in batches(4):
        params, state, _ = step(params, state, x)
        message = follow.encode_fused(params, state, tx, position)
        position = follow.passed(position, message)
        sent.append((message, params, position))
    moved, _ = follows(alone, sent)
    assert not np.array_equal(moved["stack"], base["stack"])
    joined = follow.join(sent[0][1], sent[0][0])
    assert joined == sent[0][2]


def test_a_fused_step_that_moves_other_rows_is_refused():
    base = {"kernel": jnp.ones((12, 8))}
    position = follow.start(base, key=3)
    for spec, decay, piece in [
        (rl.Spec(2), 0.0, "picks rows, got 'orthonormal'"),
        (rl.Spec(2, sketch="block"), 0.1, "expected no weight decay"),
    ]:
        tx = rl.raclora(0.1, spec, weight_decay=decay, key=3)
        state = tx.init(base)
        refuses(
            lambda tx=tx, state=state: follow.encode_fused(base, state, tx, position),
            "leaf 'kernel'",
            piece,
        )
    refuses(
        lambda: follow.encode_fused(base, state, optax.sgd(1.0), position),
        "what raclora(...) returned",
        error=TypeError,
    )


def flipped(message, bit):
    raw = bytearray(message)
    raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


def test_two_hundred_faults_and_none_is_silent():
    """Damaged, dropped, repeated, reordered, and of other runs and histories."""
    spec, base = spec_of(), params_of("bfloat16")
    ours = [message for message, *_ in messages_of(spec, base, 6)]
    other_key, other_base = (
        [message for message, *_ in messages_of(spec, weights, 6)]
        for weights in (base, jax.tree.map(lambda w: w * 2, base))
    )
    other_key = [renamed(message) for message in other_key]
    otherwise = [m for m, *_ in messages_of(spec, base, 6, weight_decay=0.5)]
    starts = [(base, follow.start(base, key=3))]
    for message in ours:
        starts.append(follow.apply(*starts[-1][:1], message, starts[-1][1]))
    rng = np.random.default_rng(0)

    def fault(kind, at):
        message = ours[at]
        if kind == "cut short":
            return message[: rng.integers(len(message))]
        if kind == "a bit flipped":
            return flipped(message, int(rng.integers(8 * len(message))))
        if kind == "longer":
            return message + rng.bytes(int(rng.integers(1, 9)))
        if kind == "bytes traded":
            first, second = sorted(rng.choice(len(message), 2, replace=False))
            raw = bytearray(message)
            raw[first] ^= 0x55
            raw[second] ^= 0x55
            return bytes(raw)
        if kind == "repeated":
            return ours[rng.integers(at)]
        if kind == "dropped":
            return ours[rng.integers(at + 1, len(ours))]
        if kind == "of another base":
            return other_base[at]
        if kind == "of another key":
            return other_key[at]
        return otherwise[at]

    said = {
        "cut short": "no whole message",
        "a bit flipped": "no whole message",
        "longer": "no whole message",
        "bytes traded": "no whole message",
        "repeated": "earlier one, or repeated|repeated: expected",
        "dropped": "missed: expected step",
        "of another base": "of another run",
        "of another key": "of another run",
        "of another history": "of another history",
    }
    for count, kind in zip(range(207), itertools.cycle(said)):
        at = int(rng.integers(1, 5))
        params, position = starts[at]
        before = jax.device_get(params)
        wrong = fault(kind, at)
        assert wrong != ours[at], kind
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - matched below
            follow.apply(params, wrong, position)
        assert re.search(said[kind], str(caught.value)), (count, kind, caught.value)
        assert_same_bits(jax.device_get(params), before)


def renamed(message):
    """The message as a run of another key would write it."""
    read = Message.from_bytes(message)
    return dataclasses.replace(read, run=read.run[:16] + "0" * 16).to_bytes()


def test_a_fault_names_what_is_wrong():
    base = params_of()
    position = follow.start(base, key=3)
    (message, *_), (second, *_) = messages_of(spec_of(), base, 2)
    read = Message.from_bytes(message)

    def changed(part=None, **fields):
        parts = read.parts
        if part is not None:
            parts = parts | {"kernel": parts["kernel"]._replace(**part)}
        return dataclasses.replace(read, parts=parts, **fields).to_bytes()

    def refused(message, *pieces, params=base, error=ValueError):
        refuses(lambda: follow.apply(params, message, position), *pieces, error=error)

    refused("text", "must be bytes, got str", error=TypeError)
    refused(changed({"sketch": 1}), "leaf 'kernel'", "expected a sketch of digest 1")
    numbers = read.parts["kernel"].numbers[:, :-1]
    refused(changed({"numbers": numbers}), "leaf 'kernel'", "numbers of shape (2, 8)")
    refused(message, "leaf 'kernel'", "none of these", params={"bias": base["bias"]})
    low = base | {"bias": base["bias"].astype(jnp.bfloat16)}
    refused(message, "leaf 'bias'", "a weight of float32, got bfloat16", params=low)
    longer = base | {"bias": jnp.zeros(9)}
    refused(message, "leaf 'bias'", "values of shape (9,)", params=longer)
    wider = base | {"kernel": jnp.zeros((12, 9))}
    refused(message, "leaf 'kernel'", "shape (12, 8)", params=wider)
    nearly = base | {"kernel": base["kernel"].at[3, 4].add(1e-6)}
    refused(message, "leaf 'kernel'", "weights of digest", params=nearly)
    body = message.partition(b"\n")[2].replace(b"message 1", b"message 2")
    signed = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    refused(signed, "another format", "'raclora_jax message 2'")
    signed = hashlib.sha256(b"other").hexdigest().encode() + b"\nother"
    refused(signed, "this is no message")
    refuses(lambda: follow.join(base, second), "has no digests of the weights")
    refuses(lambda: follow.join(nearly, message), "leaf 'kernel'", "weights of digest")
    assert follow.join(base, message) == position


def test_what_cannot_be_followed_is_refused_by_name():
    base = params_of("bfloat16")
    position = follow.start(base, key=3)
    step, init = trainer_of(spec_of())
    fresh = init(base)
    updates, state = step(base, fresh, batches(1)[0])

    def refused(*pieces, params=base, updates=updates, state=state, **given):
        refuses(lambda: follow.encode(params, updates, state, position, **given), *pieces)

    refused("numbers must be one of", numbers="int4")
    refused("digest_every must be at least 1", digest_every=0)
    refused("another key", state=state._replace(key_data=state.key_data + 1))
    later = state._replace(link=state.link + 1)
    refused("leaf 'kernel'", "sketch of the link that opt_state is in", state=later)
    wrong = jax.tree.map(lambda leaf: leaf * jnp.nan, updates["bias"])
    refused("leaf 'bias'", "finite", updates=updates | {"bias": wrong})
    wrong = dataclasses.replace(
        updates["kernel"], value=updates["kernel"].value.at[0, 0].set(jnp.inf)
    )
    refused("leaf 'kernel'", "finite", updates=updates | {"kernel": wrong})
    refused("leaf 'bias'", "shape (8,)", updates={"bias": jnp.ones(3)})
    refused("the update of 'more'", updates=updates | {"more": jnp.ones(3)})
    refuses(
        lambda: jax.jit(lambda p, u, s: follow.encode(p, u, s, position))(
            base, updates, state
        ),
        "encode outside of jit",
        error=TypeError,
    )
    step, init = trainer_of(spec_of(rounding="master"))
    updates, state = step(base, init(base), batches(1)[0])
    refused("leaf 'kernel'", "got 'master'", updates=updates, state=state)


def test_catching_up_from_the_log(tmp_path):
    base = params_of("bfloat16")
    sent = messages_of(spec_of(), base, 5)
    log = follow.Log(tmp_path)
    for message, *_ in sent:
        log.write(message)
        log.write(message)
    assert log.steps() == [0, 1, 2, 3, 4]
    # A follower that was cut off after the second message.
    params, position = log.replay(*sent[1][1:])
    assert_same_bits(params, sent[-1][1])
    assert position == sent[-1][2]
    assert_same_bits(log.replay(base, follow.start(base, key=3))[0], params)
    other = messages_of(spec_of(), base, 4, weight_decay=0.5)
    refuses(lambda: log.write(other[1][0]), "step-00000001", "is there already")
    refuses(lambda: log.write(sent[0][0][:-1]), "no whole message")
    elsewhere = follow.Log(tmp_path / "other")
    elsewhere.write(sent[0][0])
    refuses(lambda: elsewhere.write(other[1][0]), "step-00000000", "goes on from")
    (tmp_path / "step-00000003").unlink()
    with pytest.raises(FileNotFoundError, match="step-00000003 is missing, there are"):
        log.replay(*sent[1][1:])


def test_catching_up_from_a_checkpoint(tmp_path):
    """A trainer goes on from one, and a follower whose weights came another way joins."""
    spec, base = spec_of(), params_of("bfloat16")
    step, init = trainer_of(spec)
    whole = messages_of(spec, base, 6)
    state, position, params = init(base), follow.start(base, key=3), base
    with Checkpointer(tmp_path, spec) as checkpointer:
        for x, (message, *_) in zip(batches(3), whole, strict=False):
            updates, state = step(params, state, x)
            params, position = follow.apply(params, message, position)
        checkpointer.save(3, (params, state), data=position)
        checkpointer.wait()
        found = checkpointer.restore((params, state))
    (params, state), position = found.state, follow.Position(*found.data)
    for x, (message, weights, _) in zip(batches(6)[3:], whole[3:], strict=True):
        updates, state = step(params, state, x)
        again = follow.encode(params, updates, state, position, digest_every=2)
        assert again == message
        params, position = follow.apply(params, message, position)
        assert_same_bits(params, weights)
    joined = follow.join(whole[3][1], whole[4][0])
    moved, where = follow.apply(whole[3][1], whole[4][0], joined)
    assert_same_bits(moved, whole[4][1])
    assert where == whole[4][2]


def test_a_step_that_is_left_out_moves_nothing():
    base = params_of("bfloat16")
    tx = optax.apply_if_finite(rl.raclora(0.05, spec_of(), key=3), 3)
    state, position = tx.init(base), follow.start(base, key=3)
    sketches = rl.sample_sketch(base, spec_of(), key=3)
    wrong = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), base)
    grads = rl.project(wrong, sketches, spec_of())
    updates, state = tx.update(grads, state, base)
    message = follow.encode(base, updates, state, position)
    parts = Message.from_bytes(message).parts
    assert {name: part.kind for name, part in parts.items()} == {
        "kernel": "still",
        "stack": "still",
    }
    moved, position = follow.apply(base, message, position)
    assert_same_bits(moved, base)
    assert position.step == 1


def test_a_message_is_as_large_as_was_said():
    spec, base = spec_of(), params_of("bfloat16")
    for numbers in ("float32", "bfloat16", "int8"):
        sent = messages_of(spec, base, 2, numbers=numbers)
        said = follow.message_bytes(jax.eval_shape(lambda: base), spec, numbers=numbers)
        for message, *_ in sent:
            assert 0 < len(message) - said < 500 * len(base)


def test_a_matrix_that_stays_is_drawn_with_the_others():
    base, spec = params_of(), spec_of()
    step, init = trainer_of(spec)
    updates, state = step(base, init(base), batches(1)[0])
    kernel = updates["kernel"]
    still = dataclasses.replace(kernel, value=jnp.zeros_like(kernel.value))
    position = follow.start(base, key=3)
    messages = [
        follow.encode(base, updates | changed, state, position)
        for changed in ({}, {"kernel": still})
    ]
    (first, _), (other, _) = (follow.apply(base, m, position) for m in messages)
    assert_same_bits(other["kernel"], base["kernel"])
    assert_same_bits(other["stack"], first["stack"])
