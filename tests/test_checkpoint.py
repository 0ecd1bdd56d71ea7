"""Checkpoints: the same bits anywhere, nothing lost to damage, others' refused."""

import json
import pathlib
import shutil
import sys
import warnings
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_same_bits, chequered
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import raclora_jax as rl
from raclora_jax import checkpoint
from raclora_jax._core.digest import digests
from raclora_jax.checkpoint import _position

SPEC = rl.Spec(3, resample_every=3, rules=[rl.Rule("stack", batch=0)])
pytestmark = [
    # orbax reads all arrays at once, and lets the others go when one is damaged.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

AXES = {"kernel": P("a", "b"), "stack": P(None, "b", "a"), "bias": P("a")}
STEPS = 8


def params_of(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "kernel": jax.random.normal(keys[0], (16, 24)),
        "stack": jax.random.normal(keys[1], (2, 12, 8)),
        "bias": jnp.arange(8.0) / 8,
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def run_of(spec=SPEC, dtype="float32", **fields):
    """A run whose gradients depend on weights and step, in the drop-in form."""
    tx = rl.raclora(0.05, spec, weight_decay=0.1, key=3, **fields)

    def step(params, state, index):
        grads = jax.tree.map(lambda w: 0.3 * w + 0.1 / (index + 1), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = params_of(dtype)
    return SimpleNamespace(
        tx=tx,
        start=(params, tx.init(params)),
        step=jax.jit(step),
        donating=jax.jit(step, donate_argnums=(0, 1)),
    )


def go_on(run, state, done, until=STEPS):
    for index in range(done, until):
        state = run.step(*state, index)
    return state


def files_of(folder):
    found = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 3 and 5: folder, states by step."""
    folder, run = tmp_path_factory.mktemp("saved"), run_of()
    states = {3: go_on(run, run.start, 0, 3)}
    states[5] = go_on(run, states[3], 3, 5)
    with checkpoint.Checkpointer(folder, SPEC) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, data={"next_index": step})
    return SimpleNamespace(folder=folder, run=run, states=states)


@pytest.fixture
def copy(saved, tmp_path):
    """Its folder, to be damaged."""
    shutil.copytree(saved.folder, tmp_path / "copy")
    return tmp_path / "copy"


def restored(folder, like, spec=SPEC, **how):
    with checkpoint.Checkpointer(folder, spec) as checkpointer:
        return checkpointer.restore(like, **how)


@pytest.mark.parametrize(
    ("dtype", "spec", "fields"),
    [
        ("float32", SPEC, {}),
        ("float32", rl.Spec(3, side=0.5, resample_every=2, rules=SPEC.rules), {}),
        ("bfloat16", rl.Spec(3, rounding="master", rules=SPEC.rules), {}),
        ("bfloat16", rl.Spec(3, sketch="block", rules=SPEC.rules), {"moments": "keep"}),
    ],
    ids=["adam", "drawn side", "master", "block"],
)
def test_goes_on_with_the_same_bits(dtype, spec, fields, tmp_path):
    """Saved while the next step takes its buffers; restored from shapes alone."""
    run = run_of(spec, dtype, **fields)
    want = go_on(run, run.start, 0)
    state = go_on(run, jax.tree.map(jnp.copy, run.start), 0, 2)
    with checkpoint.Checkpointer(tmp_path, spec) as checkpointer:
        for index in range(2, 5):
            checkpointer.save(index, state, data=index)
            state = run.donating(*state, index)
    like = checkpoint.abstract_state(run.tx, jax.eval_shape(lambda: params_of(dtype)))
    for done in (2, 3, 4):
        found = restored(tmp_path, like, spec, step=done)
        assert (found.step, found.data, found.spec) == (done, done, spec)
        assert_same_bits(go_on(run, found.state, done), want)


def test_sketches_are_not_saved_and_a_law_may_change(saved, copy):
    meta = json.loads((copy / "5" / "meta" / "metadata").read_text())
    assert not any("sketches" in path for path in meta["leaves"])
    other = rl.Spec(3, sketch="rademacher", resample_every=50, rules=SPEC.rules)
    found = restored(copy, saved.states[5], other)
    assert found.spec == SPEC
    state = run_of(other).step(*found.state, 5)[1]
    # Of the old law nothing is kept, so a link begins at once.
    assert int(state.link) == int(saved.states[5][1].link) + 1


def mesh_of(shape, kind=AxisType.Auto):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, ("a", "b"), (kind, kind), devices=devices)


def placed(tree, mesh):
    """Weights, and whatever of the state has their shapes, by the weights' axes."""
    shapes = {params_of()[name].shape: axes for name, axes in AXES.items()}

    def sharding(leaf):
        return NamedSharding(mesh, shapes.get(leaf.shape, P()))

    return jax.tree.map(sharding, tree)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (2, 4)])
def test_onto_another_mesh(shape, tmp_path):
    run = run_of()
    state = go_on(run, run.start, 0, 4)
    wide = jax.device_put(state, placed(state, mesh_of((4, 2))))
    with checkpoint.Checkpointer(tmp_path, SPEC) as checkpointer:
        checkpointer.save(4, wide)
    mesh = mesh_of(shape)
    homes = placed(state[0], mesh)
    weights = jax.tree.map(
        lambda w, home: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=home),
        state[0],
        homes,
    )
    like = checkpoint.abstract_state(
        run.tx, weights, shardings=placed(run.start[1], mesh)
    )
    found = restored(tmp_path, like).state
    assert jax.tree.map(lambda leaf: leaf.sharding, found[0]) == homes
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.mesh == mesh
    bare = [tree[1]._replace(sketches=None) for tree in (found, state)]
    assert_same_bits((found[0], bare[0]), (state[0], bare[1]))


def test_a_spread_state_without_shardings_is_refused():
    params = jax.device_put(params_of(), placed(params_of(), mesh_of((4, 2))))
    with pytest.raises(ValueError, match=r"spread over 8 devices.*pass shardings="):
        checkpoint.abstract_state(run_of().tx, params)


def test_an_abstract_state_of_what_has_none_is_refused_by_name():
    with pytest.raises(TypeError, match="leaf 'name' must be an array of numbers"):
        checkpoint.abstract_state(run_of().tx, {"name": "kernel"})
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"shardings must be a tree like tx\.init"):
        checkpoint.abstract_state(run_of().tx, params_of(), shardings=[home])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("dtype", "kind"),
    chequered(
        ["float32", "bfloat16", "int8", "bool", "complex64"],
        [AxisType.Auto, AxisType.Explicit],
    ),
)
def test_digests_do_not_know_the_mesh_and_know_every_bit(dtype, kind):
    array = 40 * jax.random.normal(jax.random.key(0), (16, 24))
    array = array > 0 if dtype == "bool" else array.astype(dtype)
    alone = digests({"a": array})
    spread = jax.device_put(array, NamedSharding(mesh_of((4, 2), kind), P("a", "b")))
    assert digests({"a": spread}) == alone
    assert digests({"a": array[::-1]}) != alone
    raw = np.asarray(array).view(np.uint8).copy()
    raw[5, 7] ^= 1
    assert digests({"a": raw.view(np.asarray(array).dtype)}) != alone


@pytest.mark.smoke
def test_other_trees(tmp_path):
    """linen's TrainState, nnx's State, a key, a bool, nothing, a number of Python."""
    model = nn.Dense(5)
    variables = model.init(jax.random.key(0), jnp.ones((1, 7)))
    spec = rl.Spec(2)
    linen = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=rl.raclora(0.1, spec, key=0)
    )
    grads = jax.tree.map(jnp.ones_like, linen.params)
    _, pure = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    rest = {"key": jax.random.key(4), "on": jnp.array([True]), "none": jnp.zeros((0, 3))}
    tree = {"linen": linen.apply_gradients(grads=grads), "nnx": pure, "rest": rest}
    with checkpoint.Checkpointer(tmp_path, spec) as checkpointer:
        checkpointer.save(0, tree)
        found = checkpointer.restore({**tree, "linen": linen}).state
    assert int(found["linen"].step) == 1
    ahead = [one.apply_gradients(grads=grads) for one in (found["linen"], tree["linen"])]
    assert_same_bits(*([one.params, one.opt_state] for one in ahead))
    assert_same_bits(found["nnx"], pure)
    assert_same_bits(
        {**found["rest"], "key": jax.random.key_data(found["rest"]["key"])},
        {**rest, "key": jax.random.key_data(rest["key"])},
    )


def test_the_newest_are_kept(tmp_path):
    with checkpoint.Checkpointer(tmp_path, 2, keep=2) as checkpointer:
        assert checkpointer.latest() is None
        for step in range(5):
            checkpointer.save(step, {"w": jnp.full(3, step)})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 4]
        assert checkpointer.latest() == 4


def other_run(spec=SPEC, **change):
    params = params_of() | change
    return params, rl.raclora(0.05, spec, key=3).init(params)


OTHERS = {
    "rank": (rl.Spec(2, resample_every=3, rules=SPEC.rules), {}, "rank=2.*rank=3"),
    "side": (
        rl.Spec(3, side="left", resample_every=3, rules=SPEC.rules),
        {},
        "side='left'.*side='auto'",
    ),
    "shape": (
        SPEC,
        {"kernel": jnp.ones((16, 20))},
        r"leaf '0/kernel'.*float32 of shape \(16, 24\).*float32 of shape \(16, 20\)",
    ),
    "dtype": (
        SPEC,
        {"kernel": jnp.ones((16, 24), jnp.bfloat16)},
        "leaf '0/kernel'.*float32 of.*bfloat16 of",
    ),
    "more": (SPEC, {"new": jnp.ones(3)}, "leaf '0/new'.*holds no leaf, this run float32"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_naming_both(name, saved, copy):
    spec, change, said = OTHERS[name]
    before = files_of(copy)
    with pytest.raises(ValueError, match=said):
        restored(copy, other_run(spec, **change), spec)
    assert files_of(copy) == before
    assert restored(copy, saved.states[5]).step == 5


def test_another_optimizer_is_refused(saved, copy):
    params = params_of()
    state = rl.raclora(0.05, SPEC, inner=optax.identity(), key=3).init(params)
    with pytest.raises(ValueError, match=r"inner_state.*this run no leaf"):
        restored(copy, (params, state))


HARM = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "missing": lambda raw: None,
    "empty": lambda raw: b"",
    "flipped": lambda raw: (
        bytes([*raw[: len(raw) // 2], raw[len(raw) // 2] ^ 16]) + raw[len(raw) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_any_damage_is_seen_or_harmless(harm, saved, tmp_path):
    """Every file of the newest in turn: its own bits, or the one before and one line."""
    fell_back = 0
    for name, raw in files_of(saved.folder / "5").items():
        folder = tmp_path / "copy"
        shutil.copytree(saved.folder, folder)
        hurt, file = HARM[harm](raw), folder / "5" / name
        file.unlink() if hurt is None else file.write_bytes(hurt)
        before = files_of(folder / "3")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = restored(folder, saved.states[5])
        said = [str(one.message) for one in said if "not whole" in str(one.message)]
        want = saved.states[found.step]
        assert_same_bits(found.state[0], want[0])
        assert_same_bits(found.state[1].inner_state, want[1].inner_state)
        assert found.data == {"next_index": found.step}
        if found.step == 3:
            fell_back += 1
            assert len(said) == 1
            assert "step 5 (" in said[0]
            assert "restored step 3 instead" in said[0]
            assert len(list((folder / "damaged").iterdir())) == 1
            assert files_of(folder / "3") == before
        else:
            assert not said
        shutil.rmtree(folder)
    assert fell_back >= 3


def test_after_a_fallback_the_run_saves_the_same_step_again(saved, copy):
    shutil.rmtree(copy / "5" / "state")
    run = saved.run
    with checkpoint.Checkpointer(copy, SPEC, keep=2) as checkpointer:
        with pytest.warns(UserWarning, match="not whole"):
            found = checkpointer.restore(saved.states[3])
        state = go_on(run, found.state, 3, 5)
        checkpointer.save(5, state)
        checkpointer.wait()
        assert checkpointer.steps() == [3, 5]
        again = checkpointer.restore(saved.states[5]).state
    assert_same_bits(go_on(run, again, 5), go_on(run, saved.states[5], 5))


def test_none_is_whole(saved, copy):
    for step in ("3", "5"):
        (copy / step / "meta" / "metadata").write_text("{")
    before = files_of(copy)
    with pytest.raises(ValueError, match=r"nothing was changed there: step 5: .*step 3"):
        restored(copy, saved.states[5])
    assert files_of(copy) == before


def test_what_is_not_there(saved, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"start from tx\.init"):
        restored(tmp_path / "new", saved.states[5])
    with pytest.raises(FileNotFoundError, match=r"step 4 in .*there are: 3, 5"):
        restored(copy, saved.states[5], step=4)
    assert restored(copy, saved.states[5], step=3).step == 3


def test_steps_only_grow(saved, copy):
    with checkpoint.Checkpointer(copy, SPEC) as checkpointer:
        for step in (5, 4):
            with pytest.raises(
                ValueError, match=f"step {step} does not come after step 5"
            ):
                checkpointer.save(step, saved.states[5])


def test_positions_in_the_data(tmp_path):
    state = {"w": jnp.ones(3)}
    with checkpoint.Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(0, state, data=b"\x00\xff")
        assert checkpointer.restore(state).data == b"\x00\xff"
        with pytest.raises(TypeError, match="data must be bytes or what JSON can hold"):
            checkpointer.save(1, state, data=object())
        with pytest.raises(TypeError, match="leaf 'name' must be an array"):
            checkpointer.save(1, {"name": "kernel"})
        checkpointer.save(1, state)
        assert checkpointer.restore(state).data is None
    same, mine, yours = (_position.as_text({"next_index": n}) for n in (1, 1, 2))
    assert _position.own([same, mine], 9) == {"next_index": 1}
    with pytest.raises(
        ValueError, match="of 2 processes, which differ, and this run has 1"
    ):
        _position.own([mine, yours], 9)


def test_without_orbax(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'raclora-jax\[checkpoint\]'"):
        checkpoint.Checkpointer(tmp_path, 2)
