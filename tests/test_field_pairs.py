"""Methods that train the pair by a rule or a form of their own, in float64.

The oracles are the papers' formulae, with ``W (e, d)``, the drawn factor ``A (r, d)`` and
the zero factor ``B (e, r)``; a leaf with ``side="left"`` is that ``W`` transposed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import with_repeats

import raclora_jax as rl
from raclora_jax import methods

ROWS, COLS, RANK, SCALING = 7, 5, 3, 1.5
LEFT_AND_RIGHT = pytest.mark.parametrize("side", ["left", "right"])


# Drawing with threefry compiles longer than all the rest.


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def spec(side="left", rank=RANK, **kwargs):
    return rl.Spec(rank, side=side, alpha=SCALING * rank, **kwargs)


def kernel(seed=0, shape=(ROWS, COLS)):
    return np.random.default_rng(seed).normal(size=shape)


def linear(params, gradient):
    """A loss whose gradient is given."""
    return jnp.sum((jnp.eye(gradient.shape[0]) @ params["kernel"]) * gradient)


def quadratic(params, x, y):
    return jnp.mean((x @ params["kernel"] - y) ** 2)


def random_pair(method, seed=0, size=1.0, weight=None):
    """A state of a method whose factors are both far from zero."""
    weight = kernel() if weight is None else weight
    state = method.init({"kernel": jnp.asarray(weight)})
    random = np.random.default_rng(seed)
    drawn, zero = (
        {"kernel": jnp.asarray(size * random.normal(size=held["kernel"].shape))}
        for held in (state.drawn, state.zero)
    )
    return state._replace(drawn=drawn, zero=zero)


def on_paper(state, gradient, side):
    """A, B and the gradient as the papers have them."""
    drawn, zero = np.array(state.drawn["kernel"]), np.array(state.zero["kernel"])
    return drawn, zero.T, gradient.T if side == "left" else gradient


def moved(before, after, name):
    return np.array(getattr(after, name)["kernel"] - getattr(before, name)["kernel"])


def projector(columns):
    return columns @ np.linalg.pinv(columns)


# Stacks and groups of axes

FORMS = {
    "lora_fa": {},
    "dora": {"detach_norm": False},
    "sora": {"threshold": 0.1},
    "lora_pro": {},
    "lora_rite": {},
    "allora": {"eta": 3.0},
}


@pytest.mark.parametrize("name", with_repeats(FORMS, "lora_fa", "dora", "sora", "allora"))
def test_a_stack_with_groups_of_axes_is_its_matrices(name):
    """Two steps on a leaf (2, 7, 3, 2) are those on two leaves (7, 6)."""
    x, y = kernel(1, (9, 7)), kernel(2, (9, 6))
    weights = [kernel(seed, (7, 6)) for seed in (3, 4)]

    def each(params):
        stack = params["kernel"]
        return sum(quadratic({"kernel": one.reshape(7, 6)}, x, y) for one in stack)

    def alone(params):
        return quadratic(params, x, y)

    def make(*rules):
        own = rl.Spec(RANK, side="left", rules=rules)
        return getattr(methods, name)(0.05, own, key=0, **FORMS[name])

    def stepped(method, loss):
        step = jax.jit(lambda state: method.step(state, loss)[0])
        return lambda state: step(step(state))

    def stacked(like, *leaves):
        return jnp.stack(leaves).reshape(like.shape) if like.ndim else leaves[0]

    single, whole = make(), make(rl.Rule("kernel", rows=(1,), batch=(0,)))
    starts = [random_pair(single, seed, weight=w) for seed, w in enumerate(weights)]
    like = whole.init({"kernel": jnp.asarray(weights).reshape(2, 7, 3, 2)})
    start = jax.tree.map(stacked, like, *starts)
    ends = [*map(stepped(single, alone), starts)]
    found, expected = stepped(whole, each)(start), jax.tree.map(stacked, like, *ends)
    for got, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-10)
    shown = [single.params(state)["kernel"] for state in ends]
    whole_shown = whole.params(found)["kernel"].reshape(2, 7, 6)
    np.testing.assert_allclose(whole_shown, np.stack(shown), rtol=1e-9)
    assert np.abs(whole_shown - np.stack(weights)).max() > 0.01


# LoRA-FA


@LEFT_AND_RIGHT
def test_lora_fa_is_a_projected_step_for_any_drawn_factor(side):
    gradient, changes = kernel(1), {}
    for name in ("lora_fa", "asymmetric"):
        made = getattr(methods, name)
        method = made(0.1, spec(side), inner=optax.identity(), key=0)
        state = random_pair(method)
        after, _ = method.step(state, linear, gradient)
        assert np.all(moved(state, after, "drawn") == 0)
        before, now = method.params(state)["kernel"], method.params(after)["kernel"]
        changes[name] = np.array(now - before)
    a, _, g = on_paper(state, gradient, side)
    expected = -0.1 * g @ projector(a.T)
    expected = expected.T if side == "left" else expected
    # The ridge of 1e-8 against Gram matrices of size 1.
    np.testing.assert_allclose(changes["lora_fa"], expected, atol=1e-7)
    assert np.abs(changes["asymmetric"] - expected).max() > 0.1


def test_lora_fa_has_adam_on_the_corrected_gradient():
    method = methods.lora_fa(0.1, spec(), key=0)
    state, gradient = random_pair(method), 1e-6 * kernel(1)
    after, _ = method.step(state, linear, gradient)
    a, _, g = on_paper(state, gradient, "left")
    corrected = SCALING * g @ a.T @ np.linalg.inv(a @ a.T) / SCALING**2
    expected = -0.1 * corrected / (np.abs(corrected) + 1e-6)
    np.testing.assert_allclose(moved(state, after, "zero").T, expected, rtol=1e-6)


# DoRA


@LEFT_AND_RIGHT
def test_dora_starts_at_the_weights_and_has_its_magnitudes_as_norms(side):
    method = methods.dora(0.05, spec(side), key=0)
    x, y = kernel(1, (9, ROWS)), kernel(2, (9, COLS))
    state = method.init({"kernel": jnp.asarray(kernel())})
    np.testing.assert_allclose(method.params(state)["kernel"], kernel(), rtol=1e-14)
    for _ in range(3):
        state, _ = method.step(state, quadratic, x, y)
    magnitude = np.array(state.extra["magnitude"]["kernel"])
    assert magnitude.shape == (COLS,)
    merged = np.array(method.params(state)["kernel"])
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), magnitude, rtol=1e-13)
    # The pair alone has other norms: a merge must take the magnitudes in.
    a, b, _ = on_paper(state, kernel(), side)
    pair = SCALING * (b @ a).T if side == "left" else SCALING * b @ a
    direction = kernel() + pair
    assert np.abs(np.linalg.norm(direction, axis=0) - magnitude).max() > 1e-3
    expected = magnitude * direction / np.linalg.norm(direction, axis=0)
    np.testing.assert_allclose(merged, expected, rtol=1e-12)


@pytest.mark.parametrize("detached", [True, False])
def test_dora_gradient_detached_and_full(detached):
    method = methods.dora(0.05, spec(), detach_norm=detached, key=0)
    state, gradient = random_pair(method), kernel(1)
    a, b, _ = on_paper(state, gradient, "left")
    direction = kernel() + SCALING * (b @ a).T
    size = np.array(state.extra["magnitude"]["kernel"])
    size = size / np.linalg.norm(direction, axis=0)

    def loss(base):
        return linear(method.params(state._replace(base=base)), gradient)

    of_direction = np.array(jax.grad(loss)(state.base)["kernel"])
    dots = np.sum(of_direction * direction, axis=0)
    if detached:
        np.testing.assert_allclose(of_direction, size * gradient, rtol=1e-12)
        assert np.abs(dots).min() > 0.1
    else:
        assert np.abs(dots).max() < 1e-13


def test_dora_with_a_dead_output_stays_finite():
    method = methods.dora(0.05, spec(), detach_norm=False, key=0)
    dead = kernel()
    dead[:, 2] = 0
    state = method.init({"kernel": jnp.asarray(dead)})
    for _ in range(2):
        state, _ = method.step(
            state, quadratic, kernel(1, (9, ROWS)), kernel(2, (9, COLS))
        )
    assert np.all(np.isfinite(method.params(state)["kernel"]))


# SoRA


def test_sora_threshold_is_a_proximal_step():
    """``argmin_g (g - u)^2 / 2 + threshold |g|``, u the gate after its rule alone."""
    threshold, x, y = 0.3, kernel(1, (9, ROWS)), kernel(2, (9, COLS))
    states = {}
    for size in (0.0, threshold):
        method = methods.sora(0.05, spec(), threshold=size, key=0)
        states[size], _ = method.step(random_pair(method), quadratic, x, y)
    plain, shrunk = (np.array(s.extra["gate"]["kernel"]) for s in states.values())
    grid = np.linspace(-4, 4, 800_001)
    for u, found in zip(plain, shrunk, strict=True):
        best = grid[np.argmin((grid - u) ** 2 / 2 + threshold * np.abs(grid))]
        assert abs(found - best) < 2e-5
    assert np.any(shrunk == 0)
    assert np.any(shrunk != 0)


def test_sora_threshold_is_not_multiplied_by_the_rate():
    method = methods.sora(0.0, spec(), threshold=0.01, key=0)
    state = method.init({"kernel": jnp.asarray(kernel())})
    after, _ = method.step(state, linear, kernel(1))
    lost = np.abs(state.extra["gate"]["kernel"]) - np.abs(after.extra["gate"]["kernel"])
    np.testing.assert_allclose(lost, 0.01, rtol=1e-12)


def test_sora_shut_gate_stays_shut_and_can_be_pruned():
    method = methods.sora(0.02, rl.Spec(4, side="right", alpha=6.0), key=0)
    state = method.init({"kernel": jnp.asarray(kernel())})
    gate = state.extra["gate"]["kernel"].at[jnp.array([0, 2])].set(0)
    state = state._replace(extra={"gate": {"kernel": gate}})
    x, y = kernel(1, (9, ROWS)), kernel(2, (9, COLS))
    step = jax.jit(lambda state: method.step(state, quadratic, x, y))
    for _ in range(4):
        state, _ = step(state)
    gate = np.array(state.extra["gate"]["kernel"])
    live = np.flatnonzero(gate)
    assert live.tolist() == [1, 3]
    change = np.array(method.params(state)["kernel"]) - kernel()
    assert np.linalg.matrix_rank(change, tol=1e-12) == 2
    # Shut directions cut out leave the same outputs to the last bit, live ones do not.
    rest = np.setdiff1d(np.arange(4), live)
    for cut, equal in ((rest, True), (live[:1], False)):
        pruned = state._replace(
            drawn={"kernel": state.drawn["kernel"].at[cut].set(0)},
            zero={"kernel": state.zero["kernel"].at[cut].set(0)},
        )
        for output in (
            lambda state: method.params(state)["kernel"],
            lambda state: step(state)[1],
        ):
            assert np.array_equal(output(pruned), output(state)) == equal
    # In a pair of the live rank they are the same to rounding.
    small = methods.sora(0.02, rl.Spec(2, side="right", alpha=3.0), key=0)
    narrow = state._replace(
        drawn={"kernel": state.drawn["kernel"][live]},
        zero={"kernel": state.zero["kernel"][live]},
        extra={"gate": {"kernel": state.extra["gate"]["kernel"][live]}},
    )
    shown = small.params(narrow)["kernel"]
    np.testing.assert_allclose(shown, method.params(state)["kernel"], rtol=1e-14)


# LoRA-Pro


def lora_pro_directions(a, b, g):
    """h_A and h_B, the small Sylvester equation solved as one linear system."""
    inverse, eye = np.linalg.inv(b.T @ b), np.eye(len(a))
    g_a, g_b = SCALING * b.T @ g, SCALING * g @ a.T
    known = -inverse @ g_a @ a.T / SCALING**2
    system = np.kron(b.T @ b, eye) + np.kron(eye, (a @ a.T).T)
    x = np.linalg.solve(system, known.ravel()).reshape(known.shape)
    h_a = inverse @ g_a / SCALING**2 + x @ a
    outside = (np.eye(len(b)) - projector(b)) @ g_b
    return h_a, outside @ np.linalg.inv(a @ a.T) / SCALING**2 - b @ x, g_a, g_b


def lora_pro_step(side, split=None, size=1e3):
    """Factors, gradient and directions of a step; the size makes the ridge nothing."""
    method = methods.lora_pro(1.0, spec(side), form="sgd", key=0)
    state, gradient = random_pair(method, size=size), kernel(1)
    if split is not None:
        # (B T, T^-1 A)
        state = state._replace(
            drawn={"kernel": np.linalg.inv(split) @ state.drawn["kernel"]},
            zero={"kernel": split.T @ state.zero["kernel"]},
        )
    after, _ = method.step(state, linear, gradient)
    h_a, h_b = -moved(state, after, "drawn"), -moved(state, after, "zero").T
    return *on_paper(state, gradient, side), h_a, h_b


@LEFT_AND_RIGHT
def test_lora_pro_moves_as_near_to_the_gradient_as_a_pair_can(side):
    a, b, g, h_a, h_b = lora_pro_step(side)
    change = SCALING * (b @ h_a + h_b @ a)
    left, right = np.eye(len(b)) - projector(b), np.eye(a.shape[1]) - projector(a.T)
    np.testing.assert_allclose(change, g - left @ g @ right, atol=1e-9)
    # The nearest of all pairs of directions, by least squares over both.
    e, d = g.shape
    tangent = np.hstack([np.kron(b, np.eye(d)), np.kron(np.eye(e), a.T)])
    nearest = tangent @ np.linalg.lstsq(tangent, g.ravel(), rcond=None)[0]
    np.testing.assert_allclose(change.ravel(), nearest, atol=1e-9)
    # Against the oracle, and by the descent identity.
    own_a, own_b, g_a, g_b = lora_pro_directions(a, b, g)
    np.testing.assert_allclose(h_a, own_a, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(h_b, own_b, rtol=1e-6, atol=1e-12)
    descent = np.sum(g_a * h_a) + np.sum(g_b * h_b)
    assert np.isclose(descent, np.sum(change**2), rtol=1e-9)


def test_lora_pro_is_the_nearest_of_its_family_to_the_factors_gradients():
    a, b, g, h_a, h_b = lora_pro_step("left", size=30.0)
    _, _, g_a, g_b = lora_pro_directions(a, b, g)

    def distance(x):
        return np.sum((h_a + x @ a - g_a) ** 2) + np.sum((h_b - b @ x - g_b) ** 2)

    random = np.random.default_rng(0)
    sizes = 10 ** random.uniform(-6, -3, 200)
    others = [distance(size * random.normal(size=(RANK, RANK))) for size in sizes]
    assert min(others) > distance(np.zeros((RANK, RANK)))


def test_lora_pro_does_not_depend_on_the_split():
    split = np.random.default_rng(5).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    a, b, g, h_a, h_b = lora_pro_step("left")
    changes = [b @ h_a + h_b @ a]
    a, b, g, h_a, h_b = lora_pro_step("left", split)
    changes.append(b @ h_a + h_b @ a)
    np.testing.assert_allclose(changes[1], changes[0], atol=1e-8)
    # Gradient descent on the factors does depend on it.
    plain = [b @ (b.T @ g) + (g @ a.T) @ a]
    a, b, g, _, _ = lora_pro_step("left")
    plain.append(b @ (b.T @ g) + (g @ a.T) @ a)
    assert np.abs(plain[1] - plain[0]).max() > 0.1 * np.abs(plain[0]).max()


def test_lora_pro_first_step():
    method = methods.lora_pro(1.0, spec(sketch="gaussian_raw"), form="sgd", key=0)
    state = method.init({"kernel": jnp.asarray(kernel())})
    after, _ = method.step(state, linear, kernel(1))
    a, _, g = on_paper(state, kernel(1), "left")
    h_b = SCALING * g @ a.T @ np.linalg.inv(a @ a.T) / SCALING**2
    # The ridge of 1e-8 against a Gram matrix of size 1.
    np.testing.assert_allclose(-moved(state, after, "zero").T, h_b, atol=1e-7)
    assert np.all(moved(state, after, "drawn") == 0)


@LEFT_AND_RIGHT
def test_lora_pro_adam_is_adam_on_the_equivalent_gradient(side):
    method = methods.lora_pro(1e-2, spec(side), key=0)
    state = random_pair(method, size=1e2)
    first, second = 0.0, 0.0
    for count in (1, 2):
        gradient = kernel(count)
        a, b, g = on_paper(state, gradient, side)
        h_a, h_b, _, _ = lora_pro_directions(a, b, g)
        equivalent = SCALING * (b @ h_a + h_b @ a)
        first = 0.9 * first + 0.1 * equivalent
        second = 0.999 * second + 0.001 * equivalent**2
        even = first / (1 - 0.9**count)
        even = even / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        h_a, h_b, _, _ = lora_pro_directions(a, b, even)
        after, _ = method.step(state, linear, gradient)
        got_a, got_b = moved(state, after, "drawn"), moved(state, after, "zero").T
        np.testing.assert_allclose(got_a, -1e-2 * h_a, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(got_b, -1e-2 * h_b, rtol=1e-5, atol=1e-9)
        state = after


def test_lora_pro_says_what_it_keeps():
    params = {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}
    count = 4
    adam = methods.lora_pro(0.1, 2, key=0).optimizer_bytes(params)
    dense = methods.full(0.1).optimizer_bytes(params)
    # Two moments of the weight's size, and one more counter of the dense group.
    assert adam == dense + count == 2 * 4 * 64 * 32 + 2 * count
    assert methods.lora_pro(0.1, 2, form="sgd", key=0).optimizer_bytes(params) == 0


# LoRA-RITE


def rite_step(gradients, factors, states, count):
    """One step by the formulae, tall factors; the update of each."""
    b1, b2 = (b * (1 - b ** (count - 1)) / (1 - b**count) for b in (0.9, 0.999))
    moves = []
    for index, gradient in enumerate(gradients):
        q, r = np.linalg.qr(factors[1 - index])
        plain = gradient @ np.linalg.pinv(r)
        state = states[index]
        p = q.T @ state.get("q", q)
        v = p @ state.get("v", np.zeros_like(r)) @ p.T
        v = b2 * v + (1 - b2) * plain.T @ plain / len(plain)
        values, vectors = np.linalg.eigh(v)
        root = np.sqrt(np.maximum(values, 0)) + 1e-6
        even = plain @ vectors @ np.diag(1 / root) @ vectors.T
        m = b1 * state.get("m", np.zeros_like(even)) @ p.T + (1 - b1) * even
        states[index] = {"q": q, "v": v, "m": m}
        moves.append(m @ np.linalg.pinv(r).T)
    return moves


@LEFT_AND_RIGHT
def test_lora_rite_against_its_formulae(side):
    method = methods.lora_rite(0.1, spec(side), key=0)
    state, states = random_pair(method), [{}, {}]
    for count in (1, 2, 3):
        gradient = kernel(count)
        a, b, g = on_paper(state, gradient, side)
        gradients = SCALING * g.T @ b, SCALING * g @ a.T
        own = rite_step(gradients, (a.T, b), states, count)
        after, _ = method.step(state, linear, gradient)
        np.testing.assert_allclose(moved(state, after, "drawn").T, -0.1 * own[0], 1e-8)
        np.testing.assert_allclose(moved(state, after, "zero").T, -0.1 * own[1], 1e-8)
        state = after


def test_lora_rite_does_not_depend_on_the_split_and_adam_does():
    split = np.random.default_rng(5).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    x, y = kernel(1, (9, ROWS)), kernel(2, (9, COLS))

    def gap(method):
        step = jax.jit(lambda state: method.step(state, quadratic, x, y)[0])
        one = random_pair(method)
        other = one._replace(
            drawn={"kernel": split.T @ one.drawn["kernel"]},
            zero={"kernel": np.linalg.inv(split) @ one.zero["kernel"]},
        )
        for _ in range(6):
            one, other = step(one), step(other)
        ends = method.params(one)["kernel"], method.params(other)["kernel"]
        return float(jnp.max(jnp.abs(ends[0] - ends[1])))

    assert gap(methods.lora_rite(0.1, spec(), key=0)) < 1e-11
    assert gap(methods.lora(0.1, spec(), key=0)) > 0.05


def test_lora_rite_rests_the_drawn_factor_while_the_other_is_zero():
    method = methods.lora_rite(0.1, spec(), key=0)
    states = [method.init({"kernel": jnp.asarray(kernel())})]
    for count in (1, 2):
        states.append(method.step(states[-1], linear, kernel(count))[0])
    assert np.all(moved(states[0], states[1], "drawn") == 0)
    assert np.all(moved(states[0], states[1], "zero") != 0)
    assert np.all(moved(states[1], states[2], "drawn") != 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[2]))
