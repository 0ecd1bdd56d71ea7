"""The nearest rivals against their formulae in NumPy, in float64.

Leaves are lopsided, several steps and links long, and what is drawn is drawn by the
library's own function of (key, path, link).
"""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import states_of
from reference import Adam

import raclora_jax as rl
from raclora_jax import methods
from raclora_jax.methods import _projected

ROWS, COLS, RANK, EVERY, RATE = 7, 5, 2, 3, 0.03
SIDES = pytest.mark.parametrize("side", ["left", "right"])
SEEDS = pytest.mark.parametrize("seed", [0, 1])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def weights(seed=0):
    return {"kernel": normal(seed, ROWS, COLS), "bias": normal(seed + 10, COLS)}


X, Y = normal(20, 9, ROWS), normal(21, 9, COLS)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def grads_of(params):
    rest = X @ params["kernel"] + params["bias"] - Y
    rest *= 2 / rest.size
    return {"kernel": X.T @ rest, "bias": rest.sum(0)}


def history(method, steps, start):
    given = jax.tree.map(jnp.asarray, start)
    return states_of(method, given, loss_fn, X, Y, steps=steps)


def shown(method, steps, start):
    """The weights after every step."""
    states = history(method, steps, start)[1:]
    return [jax.tree.map(np.asarray, method.params(state)) for state in states]


def assert_steps(found, expected, atol=1e-9):
    for one, other in zip(found, expected, strict=True):
        for name, leaf in other.items():
            np.testing.assert_allclose(one[name], leaf, atol=atol, err_msg=name)


def apart(found, wrong):
    """How far a wrong version ends from the right one."""
    return np.abs(found[-1]["kernel"] - wrong[-1]["kernel"]).max()


def raw(key, link, side, rank=RANK):
    """P, (dim, rank), with entries N(0, 1 / rank)."""
    spec = rl.Spec(rank, side=side, sketch="gaussian_raw")
    like = {"kernel": jnp.zeros((ROWS, COLS))}
    return np.asarray(rl.sample_sketch(like, spec, key=key, link=link)["kernel"]).T / (
        np.sqrt(rank)
    )


def adam():
    return Adam(0.9, 0.999, 1e-8)


# LoRA+ -------------------------------------------------------------------------------


def test_lora_plus_of_ratio_one_is_lora():
    spec = rl.Spec(RANK, side="left", alpha=3.0)
    one = methods.lora_plus(RATE, spec, ratio=1.0, key=1)
    assert_steps(
        shown(one, 6, weights()), shown(methods.lora(RATE, spec, key=1), 6, weights())
    )


@SIDES
@SEEDS
def test_lora_plus_is_adam_at_two_rates(side, seed):
    """The zero factor at 4 times the rate; the ratio behind Adam, not before it."""
    scaling, ratio = 1.5, 4.0
    spec = rl.Spec(RANK, side=side, alpha=scaling * RANK)

    def by_hand(of_zero, of_drawn, inside=1.0):
        W, params = weights(seed)["kernel"], weights(seed)
        A = np.asarray(method.init(weights(seed)).drawn["kernel"])
        B = np.zeros((RANK, COLS if side == "left" else ROWS))
        rules, steps = {name: adam() for name in ("A", "B", "bias")}, []
        for _ in range(6):
            grads = grads_of(params)
            G = grads["kernel"] if side == "left" else grads["kernel"].T
            gA, gB = scaling * B @ G.T, inside * scaling * A @ G
            A = A - RATE * of_drawn * rules["A"](gA)
            B = B - RATE * of_zero * rules["B"](gB)
            pair = scaling * (A.T @ B if side == "left" else B.T @ A)
            bias = params["bias"] - RATE * rules["bias"](grads["bias"])
            params = {"kernel": W + pair, "bias": bias}
            steps.append(params)
        return steps

    method = methods.lora_plus(RATE, spec, ratio=ratio, key=seed)
    found = shown(method, 6, weights(seed))
    assert_steps(found, by_hand(ratio, 1))
    assert apart(found, by_hand(1, ratio)) > 1e-2
    assert apart(found, by_hand(1, 1, inside=ratio)) > 1e-2


# PiSSA -------------------------------------------------------------------------------


@SIDES
@SEEDS
def test_pissa_starts_at_the_weight_with_its_leading_triples(side, seed):
    scaling, start = 1.5, weights(seed)
    method = methods.pissa(RATE, rl.Spec(RANK, side=side, alpha=scaling * RANK))
    state = method.init(jax.tree.map(jnp.asarray, start))
    np.testing.assert_allclose(
        method.params(state)["kernel"], start["kernel"], rtol=1e-12
    )
    U, S, V = np.linalg.svd(start["kernel"])
    leading = U[:, :RANK] * S[:RANK] @ V[:RANK]
    drawn, zero = (np.asarray(f["kernel"]) for f in (state.drawn, state.zero))
    pair = drawn.T @ zero if side == "left" else zero.T @ drawn
    np.testing.assert_allclose(scaling * pair, leading, atol=1e-12)
    rest = start["kernel"] - leading
    np.testing.assert_allclose(state.base["kernel"], rest, atol=1e-12)
    # Both factors carry the root of the singular values.
    for factor in (drawn, zero):
        np.testing.assert_allclose(
            factor @ factor.T, np.diag(S[:RANK] / scaling), atol=1e-12
        )


def test_pissa_trains_the_leading_part_and_leaves_the_rest():
    method = methods.pissa(RATE, RANK)
    first, *_, last = history(method, 6, weights())
    np.testing.assert_array_equal(first.base["kernel"], last.base["kernel"])
    change = np.asarray(method.params(last)["kernel"]) - weights()["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-9) == 2 * RANK
    # The first step of LoRA's drawn factor is zero: here both move.
    second = history(method, 1, weights())[1]
    assert np.all(second.drawn["kernel"] != first.drawn["kernel"])


def test_pissa_of_a_stack_is_of_each_matrix():
    stack = normal(3, 2, 7, 3, 2)
    spec = rl.Spec(RANK, rules=[rl.Rule("w", rows=1, batch=0)])
    state = methods.pissa(RATE, spec).init({"w": jnp.asarray(stack)})
    for index, one in enumerate(stack):
        S = np.linalg.svd(one.reshape(7, 6), compute_uv=False)
        rest = np.linalg.svd(np.asarray(state.base["w"][index]).reshape(7, 6))[1]
        np.testing.assert_allclose(rest[: len(S) - RANK], S[RANK:], atol=1e-12)


# RSO and FedKRSO -----------------------------------------------------------------------


def chain_by_hand(start, steps, side, P_of, proximal):
    """Adam on B from zero in each link, W + P B; all links anew but for the bias."""
    params, rules, found = start, {"bias": adam()}, []
    for step in range(steps):
        if step % EVERY == 0:
            W, P, rules["B"] = params["kernel"], P_of(step // EVERY), adam()
            B = np.zeros((RANK, COLS if side == "left" else ROWS))
        grads = grads_of(params)
        G = grads["kernel"] if side == "left" else grads["kernel"].T
        B = B - RATE * rules["B"](P.T @ G + proximal * B)
        kernel = W + (P @ B if side == "left" else (P @ B).T)
        bias = params["bias"] - RATE * rules["bias"](grads["bias"])
        params = {"kernel": kernel, "bias": bias}
        found.append(params)
    return found


@SIDES
@SEEDS
def test_rso_is_a_chain_of_proximal_subproblems(side, seed):
    spec, start = rl.Spec(RANK, side=side, resample_every=EVERY), weights(seed)
    method = methods.rso(RATE, spec, proximal=2.0, key=seed)
    found = shown(method, 8, start)

    def by_hand(proximal, P_of=lambda link: raw(seed, link, side)):
        return chain_by_hand(start, 8, side, P_of, proximal)

    assert_steps(found, by_hand(2.0))
    assert apart(found, by_hand(0.0)) > 1e-3
    assert apart(found, by_hand(2.0, lambda link: raw(seed, 0, side))) > 1e-2
    orthonormal = by_hand(2.0, lambda link: np.linalg.qr(raw(seed, link, side))[0])
    assert apart(found, orthonormal) > 1e-3


def test_fed_krso_draws_its_links_from_the_seeds_of_a_round():
    seeds, links, spec = 2, 5, rl.Spec(RANK, side="left", resample_every=EVERY)
    method = methods.fed_krso(RATE, spec, seeds=seeds, links=links, key=4)
    steps, start = 2 * links * EVERY, weights()
    states = history(method, steps, start)
    drawn = [np.asarray(s.drawn["kernel"]).T / np.sqrt(RANK) for s in states[1::EVERY]]
    numbers = []
    for link, P in enumerate(drawn):
        first = link // links * seeds
        every = [raw(4, number, "left") for number in range(2 * seeds)]
        (number,) = (n for n, own in enumerate(every) if np.allclose(own, P))
        assert first <= number < first + seeds
        numbers.append(number)
    assert len(set(numbers)) == 2 * seeds

    def by_hand(numbers):
        return chain_by_hand(
            start, steps, "left", lambda link: raw(4, numbers[link], "left"), 0.0
        )

    found = [jax.tree.map(np.asarray, method.params(state)) for state in states[1:]]
    assert_steps(found, by_hand(numbers))
    # A round moves the weights inside the span of its own seeds: K r = 4 of 7 rows.
    change = found[links * EVERY - 1]["kernel"] - start["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-9) == seeds * RANK
    assert apart(found, by_hand(range(2 * links))) > 1e-2


# Fira and APOLLO -----------------------------------------------------------------------


def limited(term, norm, growth=1.01):
    """The term no longer than 1.01 times the last norm, and its own."""
    own = np.linalg.norm(term)
    if norm is not None and own > growth * norm:
        term = term * growth * norm / own
    return term, np.linalg.norm(term)


def tall(kernel, side):
    """The projected side first."""
    return kernel if side == "left" else kernel.T


@SIDES
@SEEDS
def test_fira_adds_the_rest_of_the_gradient_at_the_scale_of_its_moments(side, seed):
    scaling, start = 1.5, weights(seed)
    spec = rl.Spec(RANK, side=side, alpha=scaling * RANK, resample_every=EVERY)

    def by_hand(growth=1.01, whole=False):
        params, rules, norm, found = start, (adam(), adam()), None, []
        for step in range(8):
            grads = grads_of(params)
            G = tall(grads["kernel"], side)
            if step % EVERY == 0:
                P = np.linalg.svd(G)[0][:, :RANK]
                own = np.asarray(states[step].opt_state[0].basis["kernel"]).T
                P = P * np.sign(np.sum(P * own, axis=0))  # a vector or its negative
            R = P.T @ G
            N = rules[0](R)
            axis = None if whole else 0
            phi = np.sqrt(np.sum(N**2, axis)) / (np.sqrt(np.sum(R**2, axis)) + 1e-8)
            rest, norm = limited(phi * (G - P @ R) * scaling, norm, growth)
            kernel = params["kernel"] - RATE * tall(scaling * P @ N + rest, side)
            bias = params["bias"] - RATE * rules[1](grads["bias"])
            params = {"kernel": kernel, "bias": bias}
            found.append(params)
        return found

    method = methods.fira(RATE, spec)
    states = history(method, 8, start)[1:]
    found = [jax.tree.map(np.asarray, state.params) for state in states]
    assert_steps(found, by_hand(), atol=1e-8)
    assert apart(found, by_hand(growth=np.inf)) > 1e-3
    assert apart(found, by_hand(whole=True)) > 1e-3
    galore = shown(methods.galore(RATE, spec), 8, start)
    assert apart(found, galore) > 1e-2


APOLLOS = {"apollo": (RANK, 0, 1.0), "apollo_mini": (1, None, None)}


@SIDES
@SEEDS
@pytest.mark.parametrize("name", APOLLOS)
def test_apollo_is_the_gradient_at_the_scale_of_a_small_adam(name, side, seed):
    """Channels of the other side, or the whole matrix; moments live through new P."""
    rank, axis, factor = APOLLOS[name]
    factor = factor or np.sqrt(ROWS if side == "left" else COLS)
    start = weights(seed)
    method = getattr(methods, name)(
        RATE, rl.Spec(RANK, side=side, resample_every=EVERY), key=seed
    )

    def by_hand(growth=1.01, axis=axis, reset=False):
        params, rules, norm, found = start, [adam(), adam()], None, []
        for step in range(16):
            grads = grads_of(params)
            G, P = tall(grads["kernel"], side), raw(seed, step // EVERY, side, rank)
            if reset and step % EVERY == 0:
                rules[0] = adam()
            R = P.T @ G
            N = rules[0](R)
            scale = np.sqrt(np.sum(N**2, axis)) / (np.sqrt(np.sum(R**2, axis)) + 1e-8)
            moved, norm = limited(factor * scale * G, norm, growth)
            kernel = params["kernel"] - RATE * tall(moved, side)
            bias = params["bias"] - RATE * rules[1](grads["bias"])
            params = {"kernel": kernel, "bias": bias}
            found.append(params)
        return found

    found = shown(method, 16, start)
    assert_steps(found, by_hand())
    assert apart(found, by_hand(growth=np.inf)) > 1e-4
    assert apart(found, by_hand(reset=True)) > 1e-4
    other = by_hand(axis=None if axis == 0 else 0)
    assert apart(found, other) > 1e-4


def test_apollo_in_every_direction_is_adam_by_channels(monkeypatch):
    """With the identity for P and no limit, s_j is |Adam of G_j| / |G_j|."""

    def identity(data, link, plans):
        return {"kernel": jnp.eye(COLS - 1, COLS)}

    monkeypatch.setattr("raclora_jax.methods._apollo.unit_projections", identity)
    monkeypatch.setattr(_projected, "_GROWTH", 1e9)
    method = methods.apollo(RATE, rl.Spec(COLS - 1, side="right"), key=0)
    start = weights() | {"kernel": normal(0, ROWS, COLS)}

    def flat(params, x, y):
        """The last column has no gradient, so four directions are all there are."""
        return loss_fn(params | {"kernel": params["kernel"].at[:, -1].set(0)}, x, y)

    given = jax.tree.map(jnp.asarray, start)
    states = states_of(method, given, flat, X, Y, steps=4)
    rule, kernel, bias = adam(), start["kernel"], start["bias"]
    for state in states[1:]:
        held = kernel * (np.arange(COLS) < COLS - 1)
        G = grads_of({"kernel": held, "bias": bias})["kernel"]
        G[:, -1] = 0
        N = rule(G)
        scale = np.linalg.norm(N, axis=1) / (np.linalg.norm(G, axis=1) + 1e-8)
        kernel, bias = (
            kernel - RATE * scale[:, None] * G,
            np.asarray(state.params["bias"]),
        )
        np.testing.assert_allclose(state.params["kernel"], kernel, atol=1e-9)


def test_apollo_keeps_no_projection_and_fira_keeps_one():
    params = {"kernel": jnp.zeros((60, 40), jnp.float32)}
    moments, counter, norm = 2 * 4 * RANK * 60, 4, 4
    apollo = methods.apollo(RATE, RANK, key=0).optimizer_bytes(params)
    assert apollo == moments + counter + norm
    mini = methods.apollo_mini(RATE, RANK, key=0).optimizer_bytes(params)
    assert mini == moments // RANK + counter + norm
    fira = methods.fira(RATE, RANK).optimizer_bytes(params)
    assert fira == moments + counter + norm + 4 * RANK * 40


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo_mini"])
def test_a_stack_with_groups_of_axes_is_its_matrices(name):
    """Scales of channels and norms of the limiter are those of each matrix."""
    stack, x = normal(3, 7, 2, 3, 2), normal(4, 9, 7)
    y = normal(5, 2, 9, 6)
    options = {} if name == "fira" else {"key": 0}

    def each(params):
        one = jnp.moveaxis(params["w"], 1, 0).reshape(2, 7, 6)
        return sum(jnp.mean((x @ w - t) ** 2) for w, t in zip(one, y, strict=True))

    def run(params, rule):
        spec = rl.Spec(RANK, side="right", rules=[rule], resample_every=2)
        method = getattr(methods, name)(RATE, spec, **options)
        return states_of(method, params, each, steps=5)[-1]

    rule = rl.Rule("w", rows=0, batch=1)
    whole = run({"w": jnp.asarray(stack)}, rule)
    # Alone, a matrix draws another P than in a stack: Fira draws none.
    if name == "fira":
        for index in range(2):
            alone = stack.copy()
            alone[:, 1 - index] = 100 * alone[:, 1 - index]
            other = run({"w": jnp.asarray(alone)}, rule)
            np.testing.assert_allclose(
                other.params["w"][:, index], whole.params["w"][:, index], atol=1e-9
            )
    norms = np.asarray(whole.opt_state[0].norms["w"])
    assert norms.shape == (2,)
    assert norms[0] != norms[1]


# Muon and AdaLomo ----------------------------------------------------------------------


def newton_schulz(M):
    X = M / np.linalg.norm(M)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def muon_by_hand(kernel, gradients, nesterov=True):
    momentum = 0.0
    for t, G in enumerate(gradients, 1):
        momentum = 0.95 * momentum + 0.05 * G
        if nesterov:
            ahead = momentum / (1 - 0.95 ** (t + 1))
            ahead = 0.95 * ahead + 0.05 * G / (1 - 0.95**t)
        else:
            ahead = momentum / (1 - 0.95**t)
        wide = len(ahead) <= len(ahead.T)
        polar = newton_schulz(ahead) if wide else newton_schulz(ahead.T).T
        kernel = kernel - RATE * 0.2 * np.sqrt(max(G.shape)) * polar
    return kernel


@pytest.mark.parametrize("shape", [(7, 5), (4, 9)])
def test_muon_makes_the_momentum_orthogonal(shape):
    gradients = [normal(seed, *shape) for seed in range(5)]
    start = {"kernel": normal(7, *shape), "bias": normal(8, 5)}

    def linear(params, G):
        return jnp.sum(params["kernel"] * G) + jnp.sum(params["bias"] ** 3)

    method = methods.muon(RATE, 2)
    state = method.init(jax.tree.map(jnp.asarray, start))
    for G in gradients:
        before, (state, _) = state, method.step(state, linear, G)
    kernel = np.asarray(state.params["kernel"])
    np.testing.assert_allclose(
        kernel, muon_by_hand(start["kernel"], gradients), atol=1e-9
    )
    plain = muon_by_hand(start["kernel"], gradients, nesterov=False)
    assert np.abs(kernel - plain).max() > 1e-4
    # Every direction of a step is about as long as any other.
    move = (kernel - np.asarray(before.params["kernel"])) / RATE
    values = np.linalg.svd(move, compute_uv=False) / (0.2 * np.sqrt(max(shape)))
    assert 0.6 < values.min() <= values.max() < 1.3
    tx = optax.adamw(RATE, weight_decay=0.0, nesterov=True)
    bias, held = jnp.asarray(start["bias"]), tx.init(jnp.asarray(start["bias"]))
    for _ in gradients:
        update, held = tx.update(3 * bias**2, held, bias)
        bias = bias + update
    np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-9)


def test_muon_reads_its_matrices_off_the_spec():
    """A stack is its matrices, groups of axes are one side, and a frozen leaf stays."""
    rules = [rl.Rule("w", rows=(1,), batch=0), rl.Rule("still", mode="frozen")]
    stack, G = normal(0, 3, 7, 2, 3), normal(1, 3, 7, 2, 3)
    start = {"w": jnp.asarray(stack), "still": jnp.ones((4, 4))}

    def linear(params, G):
        return jnp.sum(params["w"] * G) + jnp.sum(params["still"])

    method = methods.muon(RATE, rl.Spec(2, rules=rules))
    state, _ = method.step(method.init(start), linear, jnp.asarray(G))
    for one, gradient, after in zip(stack, G, state.params["w"], strict=True):
        expected = muon_by_hand(one.reshape(7, 6), [gradient.reshape(7, 6)])
        np.testing.assert_allclose(np.reshape(after, (7, 6)), expected, atol=1e-9)
    np.testing.assert_array_equal(state.params["still"], start["still"])
    assert method.trained(start) == 3 * 7 * 6
    # A momentum of each number; two counters, a threefold coefficient.
    assert method.optimizer_bytes(start) == 8 * 3 * 7 * 6 + 2 * 4 + 3 * 8


@SEEDS
def test_adalomo_is_a_factored_second_moment_relative_to_the_weights(seed):
    start = weights(seed)
    start["bias"] *= 1e-5  # below the least size of a step

    def rms(array):
        return np.sqrt(np.mean(array**2))

    def by_hand(*, clip=True, relative=True):
        params, found = start, []
        held = {"rows": 0.0, "cols": 0.0, "bias": 0.0}
        for t in range(1, 7):
            grads, keep = grads_of(params), 1 - t**-0.8
            for name, square in (
                ("rows", np.mean(grads["kernel"] ** 2, 1)),
                ("cols", np.mean(grads["kernel"] ** 2, 0)),
                ("bias", grads["bias"] ** 2),
            ):
                held[name] = keep * held[name] + (1 - keep) * square
            V = np.outer(held["rows"], held["cols"]) / held["rows"].mean()
            moved = {
                "kernel": grads["kernel"] / np.sqrt(V),
                "bias": grads["bias"] / np.sqrt(held["bias"]),
            }
            after = {}
            for name, u in moved.items():
                u = u / max(1, rms(u)) if clip else u
                size = max(1e-3, rms(params[name])) if relative else 1
                after[name] = params[name] - 0.3 * size * u
            params = after
            found.append(params)
        return found

    found = shown(methods.adalomo(0.3), 6, start)
    # optax takes the decay to a power in float32.
    assert_steps(found, by_hand(), atol=1e-6)
    assert apart(found, by_hand(clip=False)) > 1e-3
    assert apart(found, by_hand(relative=False)) > 1e-3


# Layers at a time ----------------------------------------------------------------------

SIZES = (6, 4, 7, 3)
LAYERS = len(SIZES) - 1
INPUT, TARGET = normal(30, 9, SIZES[0]), normal(31, 9, SIZES[-1])


def network(seed=0):
    made = {}
    for index, shape in enumerate(itertools.pairwise(SIZES)):
        made[f"layer_{index}"] = {
            "kernel": jnp.asarray(normal(seed + index, *shape) / 2),
            "bias": jnp.asarray(normal(seed + 9 + index, shape[1])),
        }
    return made | {"shift": jnp.zeros(SIZES[-1])}


def network_loss(params, x, y):
    for index in range(LAYERS):
        layer = params[f"layer_{index}"]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x + params["shift"] - y) ** 2)


def network_history(method, steps):
    states = states_of(method, network(), network_loss, INPUT, TARGET, steps=steps)
    return states, [jax.tree.map(np.asarray, method.params(s)) for s in states]


def moved_between(before, after):
    return {
        name
        for name in before
        if not all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
            )
        )
    }


NETWORK_GRAD = jax.jit(jax.grad(network_loss))


def adam_by_hand(found, name, rule_of):
    """The leaves of a layer after each step, by Adam on the true gradients."""
    rules: dict = {}
    for step, (before, after) in enumerate(itertools.pairwise(found)):
        grads = NETWORK_GRAD(before, INPUT, TARGET)[name]
        rules = rule_of(step, rules)
        if rules is None:
            yield before[name], after[name]
            continue
        leaves = zip(
            jax.tree.leaves(before[name]),
            jax.tree.leaves(after[name]),
            jax.tree.leaves(grads),
            strict=True,
        )
        for index, (was, now, gradient) in enumerate(leaves):
            rule = rules.setdefault(index, adam())
            yield was - RATE * rule(np.asarray(gradient)), now


@SEEDS
def test_badam_is_adam_on_one_block_with_moments_that_start_again(seed):
    method = methods.badam(RATE, steps=EVERY, key=seed)
    blocks = {f"layer_{index}" for index in range(LAYERS)} | {"shift"}
    steps = 2 * EVERY * len(blocks)
    _, found = network_history(method, steps)
    visits = []
    for first in range(0, steps, EVERY):
        moved = [
            moved_between(found[k], found[k + 1]) for k in range(first, first + EVERY)
        ]
        # Not a bit of another block moves.
        assert all(len(one) == 1 for one in moved)
        assert moved[0] == moved[-1]
        visits.append(*moved[0])
        own = found[first : first + EVERY + 1]
        for expected, now in adam_by_hand(own, visits[-1], lambda step, rules: rules):
            np.testing.assert_allclose(now, expected, atol=1e-12)
    assert set(visits[: len(blocks)]) == set(visits[len(blocks) :]) == blocks
    assert visits[: len(blocks)] != visits[len(blocks) :]


def test_badam_keeps_moments_of_its_largest_block():
    method, params = methods.badam(RATE, steps=1, key=0), network()
    largest = 4 * 7 + 7
    assert method.trained(params) == largest
    assert method.optimizer_bytes(params) == 2 * 8 * largest + 4


def branches(method):
    """How many matrix products each branch of a step has."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            inside = [*jex.jaxprs_in_params(equation.params)]
            total += equation.primitive.name == "dot_general"
            total += sum(map(count, inside))
        return total

    state = jax.eval_shape(method.init, network())
    made = jax.make_jaxpr(lambda s: method.step(s, network_loss, INPUT, TARGET))(state)

    def switches(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cond" and len(equation.params["branches"]) > 2:
                yield [count(one.jaxpr) for one in equation.params["branches"]]
            for inside in jex.jaxprs_in_params(equation.params):
                yield from switches(inside)

    return max(switches(made.jaxpr), key=sum)


def test_badam_ends_its_backward_pass_at_the_block():
    """Forward 3; backward of layer k: its gradient, and the cotangents above it."""
    assert branches(methods.badam(RATE, steps=1, key=0)) == [6, 5, 4, 3]


@SEEDS
def test_lisa_is_adam_on_drawn_layers_and_on_the_rest(seed):
    count = 2
    method = methods.lisa(RATE, steps=EVERY, layers=count, key=seed)
    steps = 6 * EVERY
    _, found = network_history(method, steps)
    drawn = []
    for first in range(0, steps, EVERY):
        moved = [
            moved_between(found[k], found[k + 1]) for k in range(first, first + EVERY)
        ]
        assert moved[0] == moved[-1]
        live = moved[0] - {"shift"}
        assert "shift" in moved[0]
        assert len(live) == count
        drawn.append(frozenset(live))
        own = found[first : first + EVERY + 1]
        for name in live:
            for expected, now in adam_by_hand(own, name, lambda step, rules: rules):
                np.testing.assert_allclose(now, expected, atol=1e-12)
    assert len(set(drawn)) > 1
    # What is of no layer has one Adam for the whole run.
    for expected, now in adam_by_hand(found, "shift", lambda step, rules: rules):
        np.testing.assert_allclose(now, expected, atol=1e-12)


def test_lisa_keeps_moments_of_its_drawn_layers():
    params = network()
    method = methods.lisa(RATE, steps=1, layers=2, key=0)
    largest, second, rest = 4 * 7 + 7, 6 * 4 + 4, 3
    assert method.trained(params) == largest + second + rest
    assert method.optimizer_bytes(params) == 2 * 8 * (2 * largest + rest) + 2 * 4
    with pytest.raises(ValueError, match="layers=4 is more than the 3 layers"):
        methods.lisa(RATE, steps=1, layers=4, key=0).init(params)


def test_layers_are_told_by_their_numbers():
    named = {f"blocks/{n}/w": None for n in (10, 2, 0)} | {"head": None, "up1/w": None}
    layers, rest = methods._layers.in_layers(named, methods._layers.layer_of)
    assert list(layers) == ["blocks/0", "blocks/2", "blocks/10", "up1"]
    assert rest == ["head"]


# Links from a drawn layer ---------------------------------------------------------------

LAYERED = rl.Spec(RANK, side="left", alpha="dim", resample_every=EVERY)


def test_links_of_one_layer_are_raclora():
    start = {"layer_0": weights()["kernel"]}

    def loss(params, x, y):
        return jnp.mean((x @ params["layer_0"] - y) ** 2)

    given = jax.tree.map(jnp.asarray, start)
    ours, plain = (
        make(RATE, LAYERED, key=3) for make in (methods.layered, methods.raclora)
    )
    found, expected = (
        m.params(states_of(m, given, loss, X, Y, steps=8)[-1]) for m in (ours, plain)
    )
    np.testing.assert_allclose(found["layer_0"], expected["layer_0"], rtol=1e-9)


def test_layers_below_the_first_of_a_link_rest_and_the_others_are_raclora():
    steps = 8 * EVERY
    method = methods.layered(RATE, LAYERED, inner=optax.identity(), key=5)
    states, found = network_history(method, steps)
    firsts = []
    for first in range(0, steps, EVERY):
        moved = moved_between(found[first], found[first + EVERY])
        live = sorted(moved - {"shift"})
        assert live == [f"layer_{k}" for k in range(LAYERS - len(live), LAYERS)]
        assert "shift" in moved
        firsts.append(LAYERS - len(live))
        # One step of the link, the dense gradient seen through its own projector.
        grads = NETWORK_GRAD(found[first], INPUT, TARGET)
        for name in live:
            S = np.asarray(states[first + 1].drawn.get(f"{name}/kernel"))
            G, d = np.asarray(grads[name]["kernel"]), S.shape[1]
            move = found[first + 1][name]["kernel"] - found[first][name]["kernel"]
            np.testing.assert_allclose(move, -RATE * d / RANK * S.T @ (S @ G), atol=1e-9)
    assert set(firsts) == set(range(LAYERS))


def test_a_layer_is_trained_with_its_chance():
    """p_l = l / L of the links, over 600 of them, by four standard errors."""
    spec = rl.Spec(RANK, side="left", resample_every=1)
    method = methods.layered(RATE, spec, inner=optax.identity(), key=7)
    step = jax.jit(lambda state: method.step(state, network_loss, INPUT, TARGET)[0])
    state, links = method.init(network()), 600
    times = np.zeros(LAYERS)
    for _ in range(links):
        state = step(state)
        zero = [np.any(state.zero[f"layer_{k}/kernel"] != 0) for k in range(LAYERS)]
        times += zero
    chance = np.arange(1, LAYERS + 1) / LAYERS
    error = np.sqrt(chance * (1 - chance) / links)
    assert np.all(np.abs(times / links - chance) <= 4 * error)


def test_a_link_ends_its_backward_pass_at_its_first_layer():
    first, *_, last = branches(methods.layered(RATE, LAYERED, key=0))
    full = branches(methods.layered(RATE, LAYERED, key=0))
    assert full == sorted(full, reverse=True)
    assert first > last


def test_bad_options():
    for bad in (
        lambda: methods.lora_plus(0.1, 2, ratio=0, key=0),
        lambda: methods.rso(0.1, 2, proximal=-1, key=0),
        lambda: methods.fed_krso(0.1, 2, seeds=0, links=1, key=0),
        lambda: methods.badam(0.1, steps=0, key=0),
        lambda: methods.lisa(0.1, steps=1, layers=0, key=0),
    ):
        with pytest.raises(ValueError, match="must be"):
            bad()
    scaled = rl.Spec(2, alpha=4.0)
    for refused in (
        lambda: methods.rso(0.1, scaled, proximal=0, key=0),
        lambda: methods.fed_krso(0.1, scaled, seeds=1, links=1, key=0),
        lambda: methods.apollo(0.1, scaled, key=0),
        lambda: methods.apollo_mini(0.1, scaled, key=0),
    ):
        with pytest.raises(ValueError, match=r"alpha=4\.0: .* leave alpha out"):
            refused()
    with pytest.raises(ValueError, match="no leaf of 'w' is of a layer"):
        methods.layered(0.1, 2, key=0).init({"w": jnp.ones((6, 5))})
