"""Followers in the adapter form: codes, scales, errors and factors equal to the bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, refuses, repeat
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from raclora_jax import follow
from raclora_jax._forms import link_end
from raclora_jax.checkpoint import ChainLog, Checkpointer
from raclora_jax.follow._message import Message

pytest.importorskip("qwix")
quantized = pytest.importorskip("raclora_jax.quantized")

STEPS = 2  # of a link
RULES = [rl.Rule("stack", batch=0), rl.Rule("table", mode="frozen")]


def spec_of(**given):
    return rl.Spec(2, **{"resample_every": STEPS, "rules": RULES, **given})


def params_of(dtype="float32"):
    shapes = {"kernel": (16, 8), "stack": (4, 8, 6), "table": (5, 4), "bias": (8,)}
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def run_of(kind, spec, *, mesh=None, key=3):
    """The beginning of a run; ``mesh`` is the kind of axes it is spread over."""
    if kind in ("float32", "bfloat16"):
        base, error = params_of(kind), None
    else:
        block = 4 if kind == "nf4" else None
        base, error = quantized.quantize(params_of(), spec, kind, block=block)
    if mesh is not None:
        base, error = on_mesh((base, error), mesh)
    return follow.begin(base, spec, key=key, error=error)


def on_mesh(tree, axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (axes,) * 2)

    def spread(leaf):
        sizes = zip(leaf.shape, ("a", "b")[-leaf.ndim :], strict=False)
        names = [n if size % mesh.shape[n] == 0 else None for size, n in sizes]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*names)))

    return jax.tree.map(spread, tree)


def stepped(factors, step):
    """Stands for a step of an optimizer: numbers that round."""

    def moved(leaf):
        waves = np.sin(step + np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        return leaf + jax.device_put(0.1 * waves, leaf.sharding)

    return jax.tree.map(moved, factors)


def messages_of(run, spec, steps, *, numbers="float32", begin=0, position=None):
    """What a trainer sends, with its run and position after each message."""
    position, sent = position or follow.start(run, key=3), []
    for step in range(begin, begin + steps):
        if step and step % STEPS == 0:
            run = follow.next_link(run, spec)
        factors = stepped(run.factors, step)
        message = follow.encode_adapter(run, factors, position, spec, numbers=numbers)
        run, position = follow.apply(run, message, position)
        sent.append((message, run, position))
    return sent


def follows(run, sent, *, key=3):
    """A follower, equal to the trainer after each message."""
    position, link = follow.start(run, key=key), 0
    for message, theirs, where in sent:
        if int(theirs.chain.link) > link:
            # Whoever has not heard of the next link is still in the one before.
            assert int(run.chain.link) == link
            link += 1
        run, position = follow.apply(run, message, position)
        assert_same_bits(jax.device_get(run), jax.device_get(theirs))
        assert position == where
    return run, position


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("int8", "float32"),
        ("nf4", "int8"),
        ("bfloat16", "int8"),
        repeat("nf4", "float32"),
        repeat("int4", "bfloat16"),
        repeat("int8", "int8"),
        repeat("bfloat16", "float32"),
        repeat("float32", "bfloat16"),
    ],
)
def test_equal_to_the_bit_over_links(kind, numbers):
    spec = spec_of()
    sent = messages_of(run_of(kind, spec), spec, 3 * STEPS, numbers=numbers)
    start = run_of(kind, spec)
    run, _ = follows(jax.device_put(jax.device_get(start)), sent)
    assert int(run.chain.link) == 2
    for before, after in zip(
        *(jax.tree.leaves((r.base_params["kernel"], r.error)) for r in (start, run)),
        strict=True,
    ):
        assert not np.array_equal(before, after)
    assert_same_bits(run.base_params["table"], start.base_params["table"])
    sizes = [len(message) for message, *_ in sent]
    assert sizes[1] < sizes[0]  # digests and the spec once a link
    if numbers == "int8":
        assert sizes[1] < len(messages_of(start, spec, 2)[1][0])


@pytest.mark.parametrize("given", [{"side": 0.5}, {"cache": False}, {"sketch": "block"}])
def test_other_specs(given):
    spec = spec_of(**given)
    run = run_of("bfloat16", spec)
    run, _ = follows(run, messages_of(run, spec, 2 * STEPS, numbers="int8"))
    assert bool(run.chain.sketches) == spec.cache


@pytest.mark.parametrize("kind", ["nf4", "bfloat16", repeat("int8"), repeat("float32")])
def test_another_mesh_has_the_same_bits(kind):
    """A trainer on (4, 2) and a follower on one device, and the reverse."""
    spec = spec_of()
    alone, spread = run_of(kind, spec), run_of(kind, spec, mesh=AxisType.Auto)
    one, _ = follows(alone, messages_of(spread, spec, 2 * STEPS + 1, numbers="int8"))
    many, _ = follows(spread, messages_of(alone, spec, 2 * STEPS + 1))
    places = [jax.tree.map(lambda leaf: leaf.sharding, run) for run in (many, spread)]
    assert places[0] == places[1]
    devices = [len(leaf.devices()) for leaf in jax.tree.leaves(one.base_params)]
    assert set(devices) == {1}


def test_an_explicit_mesh_has_the_same_bits():
    spec = spec_of()
    spread = run_of("bfloat16", spec, mesh=AxisType.Explicit)
    with jax.set_mesh(spread.base_params["kernel"].sharding.mesh):
        sent = messages_of(spread, spec, 2 * STEPS)
    follows(run_of("bfloat16", spec), sent)


def test_a_link_is_ended_on_one_device():
    """CPUs round alike in both ways, so that equal bits do not show it."""
    spec, seen = spec_of(), []
    run = run_of("bfloat16", spec, mesh=AxisType.Auto)

    def merged(*trees, spec):
        seen.extend(jax.tree.leaves(trees))
        return link_end.merged(*trees, spec=spec)

    base, *_ = link_end.link_end([run.base_params], run.factors, run.chain, spec, merged)
    arrays = [leaf for leaf in seen if isinstance(leaf, jax.Array)]
    assert {len(leaf.devices()) for leaf in arrays} == {1}
    assert len(base["kernel"].devices()) == 8


@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_the_end_of_a_link_is_that_of_next_link(kind):
    spec = spec_of()
    run = run_of(kind, spec)
    run = run._replace(factors=stepped(run.factors, 0))
    ended = follow.next_link(run, spec)
    if kind == "float32":
        base, _, chain = rl.next_link(run.base_params, run.factors, run.chain, spec)
        assert_close(ended.base_params, base)
    else:
        base, error, _, chain = quantized.next_link(*run, spec)
        exact = (
            quantized.exact_params(*trees)
            for trees in ((ended.base_params, ended.error), (base, error))
        )
        assert_close(*exact, 0.02)
    assert_close(ended.chain.sketches, chain.sketches)
    assert not any(map(np.any, jax.tree.leaves(ended.factors)))


@functools.cache
def sent_by(numbers="float32"):
    return messages_of(run_of("nf4", spec_of()), spec_of(), 2 * STEPS, numbers=numbers)


def unmoved(run, call, *pieces, error=ValueError):
    """Refused, and what was there is as it was."""
    before = jax.device_get(run)
    said = refuses(call, *pieces, error=error)
    assert_same_bits(jax.device_get(run), before)
    return said


def test_what_is_not_the_next_message_is_refused():
    sent = sent_by()
    _, run, position = sent[0]
    # The last of them has seen nothing of the link that it misses.
    for wrong, piece in [
        (sent[0][0], "this message is repeated: expected step 1, got step 0"),
        (sent[2][0], "1 message missed: expected step 1, got step 2"),
        (sent[3][0], "2 messages missed"),
        (sent[1][0][:-1], "no whole message"),
        (sent[1][0][:-9] + b"\0" + sent[1][0][-8:], "no whole message"),
        (sent_by("int8")[1][0], "of another history"),
    ]:
        unmoved(run, lambda wrong=wrong: follow.apply(run, wrong, position), piece)
    for key, kind, piece in [(4, "nf4", "other key"), (3, "int8", "other weights")]:
        other = run_of(kind, spec_of(), key=key)
        at = follow.start(other, key=key)
        unmoved(other, lambda o=other, a=at: follow.apply(o, sent[0][0], a), piece)


def test_a_follower_with_other_bits_is_told_where_a_link_begins():
    sent = sent_by()
    _, run, position = sent[STEPS - 1]

    def harmed(tree, field):
        leaf = tree["kernel"]
        array = getattr(leaf, field)
        other = array.at[0, 0].set(jnp.where(array[0, 0] == 1, 0, 1).astype(array.dtype))
        return tree | {"kernel": dataclasses.replace(leaf, **{field: other})}

    for name in ("base_params", "error"):
        # A code that is off, and an error that is: each shows in what is merged.
        wrong = run._replace(**{name: harmed(getattr(run, name), "scale")})
        said = unmoved(
            wrong,
            lambda wrong=wrong: follow.apply(wrong, sent[STEPS][0], position),
            "expected weights of digest",
        )
        assert "kernel" in said
    follow.apply(run, sent[STEPS][0], position)


def test_a_message_that_does_not_fit_is_refused():
    (message, *_), *_ = sent_by()
    run = run_of("nf4", spec_of())
    position, read = follow.start(run, key=3), Message.from_bytes(message)
    kernel = read.parts["kernel"]

    def refused(*pieces, run=run, **fields):
        wrong = dataclasses.replace(read, **fields).to_bytes()
        unmoved(run, lambda: follow.apply(run, wrong, position), *pieces)

    short = kernel._replace(numbers=kernel.numbers[:, 1:])
    refused("leaf 'kernel'", "(2, 8)", "(2, 7)", parts={"kernel": short})
    refused("leaf 'more'", "none that this run trains", parts={"more": kernel})
    refused("of link 2: expected link 0 or 1", link=2)
    refused("of link 1: expected link 0, where", link=1, spec=None, weights=None)
    refused(
        "leaf 'kernel'", "rank", spec=dataclasses.replace(spec_of(), rank=3).to_json()
    )
    refused("of weights: expected that, got a run in the adapter form", adapter=False)
    base = params_of()
    refuses(
        lambda: follow.apply(base, message, position),
        "of a run in the adapter form (follow.Adapted): expected that, got weights",
    )
    other_key = run._replace(
        chain=run.chain._replace(key_data=jnp.array([0, 4], "uint32"))
    )
    refused("the chain of the run has another key", run=other_key)


def test_encode_names_what_cannot_be_sent():
    run, spec = run_of("nf4", spec_of()), spec_of()
    position, factors = follow.start(run, key=3), stepped(run.factors, 0)

    def refused(*pieces, run=run, factors=factors, spec=spec, error=ValueError, **given):
        refuses(
            lambda: follow.encode_adapter(run, factors, position, spec, **given),
            *pieces,
            error=error,
        )

    refused("numbers must be one of", numbers="int4")
    refused(
        "leaf 'kernel'", "rank", spec=spec_of(rules=[*RULES, rl.Rule("kernel", rank=3)])
    )
    refused("leaf 'kernel'", "shape", factors=factors | {"kernel": jnp.ones((2, 3))})
    for name in ("kernel", "bias"):
        wrong = factors | {name: factors[name] * jnp.nan}
        refused(f"leaf '{name}'", "finite", factors=wrong)
        wrong = factors | {name: factors[name].astype(jnp.bfloat16)}
        refused(f"leaf '{name}'", "of float32, got bfloat16", factors=wrong)
    refused("no error to carry", run=run._replace(error=None))
    refused(
        "another key", run=follow.begin(run.base_params, spec, key=4, error=run.error)
    )
    refuses(
        lambda: jax.jit(lambda f: follow.encode_adapter(run, f, position, spec))(factors),
        "encode outside of jit",
        error=TypeError,
    )
    plain = run_of("float32", spec)
    refuses(
        lambda: follow.begin(plain.base_params, spec, key=3, error=run.error),
        "expected no error",
    )
    refuses(lambda: follow.begin(plain.base_params, spec, key=3, link=-1), "link must be")


def test_catching_up_from_the_log(tmp_path):
    sent, log = sent_by("int8"), follow.Log(tmp_path)
    for message, *_ in sent:
        log.write(message)
    run, position = log.replay(*sent[0][1:])  # cut off after the first message
    assert_same_bits(jax.device_get(run), jax.device_get(sent[-1][1]))
    assert position == sent[-1][2]


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_catching_up_from_a_chain_log(tmp_path, kind):
    """The trainer ends its links with the log; a follower begins at what it rebuilds."""
    spec, log = spec_of(), ChainLog(tmp_path)
    start = run_of(kind, spec)
    run = run_of(kind, spec, mesh=AxisType.Auto)
    position, sent = follow.start(run, key=3), []
    for link in range(3):
        if link:
            base, error, *rest = run
            ended = log.next_link(base, *rest, spec, error=error)
            run = follow.Adapted(*(ended if error else (ended[0], None, *ended[1:])))
        for step in range(STEPS):
            factors = stepped(run.factors, STEPS * link + step)
            message = follow.encode_adapter(run, factors, position, spec, numbers="int8")
            run, position = follow.apply(run, message, position)
            sent.append((message, run, position))
    follows(start, sent)
    base, error = log.rebuild(start.base_params, error=start.error, links=2), None
    if start.error:
        base, error = base
    late = follow.begin(base, spec, key=3, link=2, error=error)
    at = follow.join(late, sent[2 * STEPS][0])
    for message, theirs, where in sent[2 * STEPS :]:
        late, at = follow.apply(late, message, at)
        assert_same_bits(jax.device_get(late), jax.device_get(theirs))
        assert at == where
    refuses(lambda: follow.join(late, sent[1][0]), "step 1 has no digests")
    refuses(lambda: follow.join(late, sent[0][0]), "are not the trainer's")
    early = follow.begin(base, spec, key=3, link=1, error=error)
    refuses(
        lambda: follow.join(early, sent[2 * STEPS][0]),
        "of link 2: expected link 1",
        "link=",
    )


def test_catching_up_from_a_checkpoint(tmp_path):
    """In the middle of a link; the trainer goes on with the same messages."""
    spec, sent = spec_of(), sent_by("int8")
    _, run, position = sent[STEPS]
    with Checkpointer(tmp_path, spec) as checkpointer:
        checkpointer.save(3, run, data=position)
        checkpointer.wait()
        found = checkpointer.restore(run_of("nf4", spec))
    run, position = found.state, follow.Position(*found.data)
    rest = messages_of(
        run, spec, STEPS - 1, numbers="int8", begin=STEPS + 1, position=position
    )
    assert [message for message, *_ in rest] == [m for m, *_ in sent[STEPS + 1 :]]
    assert_same_bits(jax.device_get(rest[-1][1]), jax.device_get(sent[-1][1]))


@pytest.mark.parametrize(
    ("numbers", "gap"), [("float32", 0), ("bfloat16", 2**-7), ("int8", 1.02 / 127)]
)
def test_the_factors_become_those_of_the_message(numbers, gap):
    run, spec = run_of("nf4", spec_of()), spec_of()
    factors = stepped(run.factors, 1)
    position = follow.start(run, key=3)
    message = follow.encode_adapter(run, factors, position, spec, numbers=numbers)
    new, _ = follow.apply(run, message, position)
    assert_close(new.factors, factors, 0.1 * gap)  # no number is larger than 0.1
    assert_same_bits(new.factors["bias"], factors["bias"])
    assert numbers == "float32" or not np.array_equal(
        new.factors["kernel"], factors["kernel"]
    )


def test_a_step_that_is_left_out_moves_nothing():
    run, spec = run_of("nf4", spec_of()), spec_of()
    position = follow.start(run, key=3)
    message = follow.encode_adapter(run, run.factors, position, spec)
    assert not Message.from_bytes(message).parts
    moved, position = follow.apply(run, message, position)
    assert_same_bits(jax.device_get(moved), jax.device_get(run))
    assert position.step == 1
    # Whatever moved before is put back, since a message says all of it.
    wandered = run._replace(factors=stepped(run.factors, 0))
    back, _ = follow.apply(wandered, message, follow.start(run, key=3))
    assert_same_bits(jax.device_get(back), jax.device_get(run))
