"""The bounds of ``raclora_jax.theory`` against runs that know nothing of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import chequered

import raclora_jax as rl
from raclora_jax import theory

SEEDS = 60
# Compiling is nearly all the time these small programs take.
LAWS = ("orthonormal", "rademacher", "coordinate", "block")
ROWS, COLS, SAMPLES = 12, 6, 60


class LeastSquares:
    """``|X W - Y|^2 / 2N`` in NumPy: constants by its singular values."""

    def __init__(self):
        rng = np.random.default_rng(7)
        self.X = rng.standard_normal((SAMPLES, ROWS))
        self.Y = rng.standard_normal((SAMPLES, COLS))
        self.start = rng.standard_normal((ROWS, COLS))
        self.hessian = self.X.T @ self.X / SAMPLES
        self.mu, *_, self.L = np.linalg.eigvalsh(self.hessian)
        self.optimum = np.linalg.lstsq(self.X, self.Y)[0]

    def grad(self, W):
        return self.hessian @ (W - self.optimum)

    def gap(self, W):
        error = W - self.optimum
        return np.sum(error * (self.hessian @ error), axis=(-2, -1)) / 2


PROBLEM = LeastSquares()
GAP = float(PROBLEM.gap(PROBLEM.start))


@functools.cache
def projectors(law, side, rank, links=240):
    """``(seeds, links, dim, dim)`` from sketches that the library draws."""
    spec = rl.Spec(rank, side=side, sketch=law)
    dim = ROWS if side == "left" else COLS
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))

    def draw(key, link):
        return rl.sample_sketch(PROBLEM.start, spec, key=key, link=link)

    draw = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    draw = jax.jit(draw)
    (S,) = map(np.asarray, jax.tree.leaves(draw(keys, jnp.arange(links))))
    if law in ("coordinate", "block"):
        first = S if law == "coordinate" else S[..., None] + np.arange(rank)
        S = np.eye(dim)[first % dim]
    return np.swapaxes(S, -1, -2) @ S


def walk(H, side, gamma, estimate=None):
    """Gaps and squared gradients of ``W <- W - gamma H g``, ``(seeds, links + 1)``."""
    W = np.broadcast_to(PROBLEM.start, (len(H), ROWS, COLS))
    gaps, squares = [PROBLEM.gap(W)], []
    for link in range(H.shape[1]):
        G = PROBLEM.grad(W)
        g = G if estimate is None else estimate(W, G)
        squares.append(np.sum(G**2, axis=(1, 2)))
        W = W - gamma * (H[:, link] @ g if side == "left" else g @ H[:, link])
        gaps.append(PROBLEM.gap(W))
    return np.stack(gaps, axis=1), np.stack(squares, axis=1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("side", "dim"), [("left", ROWS), ("right", COLS)])
def test_gradient_descent_stays_below_its_bounds_and_follows_lambda(law, side, dim):
    rates = []
    for rank in (1, 3):
        spec = rl.Spec(rank, side=side, sketch=law)
        lam = theory.lambdas(PROBLEM.start, spec)[""]
        assert lam == rank / dim
        links = math.ceil(12 / lam)
        gaps, squares = walk(projectors(law, side, rank)[:, :links], side, 1 / PROBLEM.L)
        rate = theory.Gd(smoothness=PROBLEM.L, lam=lam)
        start = {"gap": GAP, "gamma": rate.largest_step}
        bound = rate.bound(**start, links=links)
        assert bound / 5 < squares.mean() < bound
        mean = gaps.mean(axis=0)
        rate = theory.GdPl(smoothness=PROBLEM.L, lam=lam, mu=PROBLEM.mu)
        for after in range(1, links + 1):
            assert mean[after] < rate.bound(**start, links=after)
        rates.append(-np.log(mean[-1] / mean[0]) / links / lam)
    assert max(rates) < 1.15 * min(rates)


@pytest.mark.parametrize(("rank", "side"), [(3, "left"), (2, "right")])
def test_cycles_of_blocks_stay_below_theirs(rank, side):
    turns, cycles = (ROWS if side == "left" else COLS) // rank, 12
    H = projectors("block", side, rank)[:, : turns * cycles]
    rate = theory.BlockPl(
        smoothness=PROBLEM.L, mu=PROBLEM.mu, dim=turns * rank, rank=rank
    )
    gaps, _ = walk(H, side, rate.largest_step)
    start = {"gap": GAP, "gamma": rate.largest_step}
    for cycle in range(1, cycles + 1):
        at = gaps[:, cycle * turns]
        assert at.mean() < rate.bound(**start, cycles=cycle)
        assert at.max() < rate.bound(**start, cycles=cycle, sure=True)


@pytest.mark.parametrize(("step", "sigma"), chequered([1.0, 0.1], [0.1, 1.0]))
def test_stochastic_steps_stay_below_theirs(sigma, step):
    rank, lam, links = 3, 3 / ROWS, 240
    rng = np.random.default_rng(3)

    def noisy(W, G):
        return G + sigma * rng.standard_normal(G.shape) / math.sqrt(G[0].size)

    H = projectors("orthonormal", "left", rank)
    gaps, squares = walk(H, "left", step / PROBLEM.L, noisy)
    known = {"smoothness": PROBLEM.L, "lam": lam, "variance": sigma**2}
    start = {"gap": GAP, "gamma": step / PROBLEM.L, "links": links}
    bound = theory.Sgd(**known).bound(**start)
    assert bound / 8 < squares.mean() < bound
    # The floor is in the bound: without it the loud run would break it.
    late, pl = gaps[:, -40:].mean(), theory.SgdPl(**known, mu=PROBLEM.mu).bound(**start)
    assert pl / 30 < late < pl


def test_a_law_that_prefers_directions_needs_lam_max():
    """Rows are kept with their own probabilities, so E[H] is diagonal."""
    rng = np.random.default_rng(0)
    kept = np.linspace(0.2, 0.8, ROWS)
    rate = theory.Sgd(smoothness=PROBLEM.L, lam=0.2, lam_max=0.8, variance=1.0)
    gamma, links = rate.largest_step, 150
    H = (rng.random((SEEDS, links, ROWS)) < kept)[..., None] * np.eye(ROWS)

    def noisy(W, G):
        return G + rng.standard_normal(G.shape) / math.sqrt(G[0].size)

    _, squares = walk(H, "left", gamma, noisy)
    assert squares.mean() < rate.bound(gap=GAP, gamma=gamma, links=links)
    assert gamma == pytest.approx(0.25 / PROBLEM.L)


BATCH, CLIENTS, KEPT, REFRESH, WEIGHT = 5, 6, 12, 0.2, 0.2


class Estimator:
    """PAGE, MVR, MARINA and EF21 from their papers, in NumPy, for all seeds at once."""

    def __init__(self, name):
        self.rng, self.update = np.random.default_rng(11), getattr(self, name)
        self.W = self.g = None
        self.noise = 0.0

    def __call__(self, W, G):
        each = np.sum((PROBLEM.Y - PROBLEM.X @ W) ** 2, axis=2)
        squares = np.mean(np.sum(PROBLEM.X**2, axis=1) * each, axis=1)
        self.noise = max(self.noise, np.max(squares - np.sum(G**2, axis=(1, 2))) / BATCH)
        first = self.clients(W) if self.update == self.ef21 else G
        self.g = first if self.W is None else self.update(W, G)
        self.W = W
        return self.g.mean(axis=1) if self.g.ndim == 4 else self.g

    def batches(self, *points):
        """Gradients at several points on the same samples."""
        rows = self.rng.integers(0, SAMPLES, (SEEDS, BATCH))
        X, Y = PROBLEM.X[rows], PROBLEM.Y[rows]
        return [np.swapaxes(X, 1, 2) @ (X @ W - Y) / BATCH for W in points]

    def clients(self, W):
        X, Y = (a.reshape(CLIENTS, -1, a.shape[1]) for a in (PROBLEM.X, PROBLEM.Y))
        return np.swapaxes(X, 1, 2) @ (X @ W[:, None] - Y) / X.shape[1]

    def coin(self):
        return (self.rng.random(SEEDS) < REFRESH)[:, None, None]

    def page(self, W, G):
        new, old = self.batches(W, self.W)
        return np.where(self.coin(), G, self.g + new - old)

    def mvr(self, W, G):
        new, old = self.batches(W, self.W)
        return new + (1 - WEIGHT) * (self.g - old)

    def marina(self, W, G):
        change = self.clients(W) - self.clients(self.W)
        order = self.rng.random((SEEDS, CLIENTS, ROWS * COLS)).argsort(axis=-1)
        kept = (order < KEPT).reshape(change.shape) * (ROWS * COLS / KEPT)
        return np.where(self.coin(), G, self.g + (kept * change).mean(axis=1))

    def ef21(self, W, G):
        missing = (self.clients(W) - self.g).reshape(SEEDS, CLIENTS, -1)
        least = np.sort(np.abs(missing), axis=-1)[..., -KEPT, None]
        sent = np.where(np.abs(missing) >= least, missing, 0)
        return self.g + sent.reshape(self.g.shape)


@pytest.mark.parametrize("name", ["page", "mvr", "marina", "ef21"])
def test_estimators_stay_below_their_bounds_at_their_largest_step(name):
    lam, links, size = 3 / ROWS, 80, ROWS * COLS
    parts = PROBLEM.X.reshape(CLIENTS, -1, ROWS)
    tops = [np.linalg.eigvalsh(X.T @ X / len(X))[-1] for X in parts]
    samples = np.sum(PROBLEM.X**2, axis=1)
    own = np.sqrt(np.mean(np.square(samples if name in ("page", "mvr") else tops)))
    make, known = {
        "page": (theory.Page, {"refresh": REFRESH, "batch": BATCH}),
        "mvr": (theory.Mvr, {"weight": WEIGHT, "variance": 0.0}),
        "marina": (
            theory.Marina,
            {"refresh": REFRESH, "compression": size / KEPT - 1, "clients": CLIENTS},
        ),
        "ef21": (theory.Ef21, {"contraction": KEPT / size}),
    }[name]
    rate = make(smoothness=PROBLEM.L, sample_smoothness=own, lam=lam, **known)
    gamma, estimator = rate.largest_step, Estimator(name)
    H = projectors("orthonormal", "left", 3)[:, :links]
    _, squares = walk(H, "left", gamma, estimator)
    if name == "mvr":
        rate = dataclasses.replace(rate, variance=estimator.noise)
    bound = rate.bound(gap=GAP, gamma=gamma, links=links)
    assert bound / 5 < squares.mean() < bound
    with pytest.raises(ValueError, match="largest step"):
        rate.bound(gap=GAP, gamma=1.01 * gamma, links=links)


def test_orthogonalised_steps_stay_below_theirs():
    rank, links, lam = 1, 240, 1 / ROWS
    rate = theory.Orthogonal(smoothness=PROBLEM.L, lam=lam, rank=rank)
    eta = rate.best_step(gap=GAP, links=links)
    H = projectors("orthonormal", "left", rank)

    def nuclear(G):
        return np.linalg.svd(G, compute_uv=False).sum(axis=1)

    W, seen = np.broadcast_to(PROBLEM.start, (SEEDS, ROWS, COLS)), []
    for link in range(links):
        G = PROBLEM.grad(W)
        seen.append(nuclear(G).mean())
        U, _, V = np.linalg.svd(H[:, link] @ G, full_matrices=False)
        W = W - eta * U[..., :rank] @ V[..., :rank, :]
    bound = rate.bound(gap=GAP, eta=eta, links=links)
    assert bound / 10 < min(seen) < bound
    assert bound == pytest.approx(math.sqrt(2 * PROBLEM.L * rank * GAP / links) / lam)
    for other in (0.5 * eta, 2 * eta):
        assert rate.bound(gap=GAP, eta=other, links=links) > bound


@pytest.mark.parametrize("local_steps", [1, 5])
def test_a_federated_link_descends_as_promised(local_steps):
    """Clients are quadratics of their own; the mean of factors is merged."""
    rng, rank = np.random.default_rng(1), 3
    parts = np.split(rng.standard_normal((40, ROWS)), 4)
    hessians = np.stack([X.T @ X / len(X) for X in parts])
    optima = rng.standard_normal((4, ROWS, COLS))
    L = np.linalg.eigvalsh(hessians).max()
    rate = theory.FedRacLora(smoothness=L, local_steps=local_steps, lam=rank / ROWS)
    eta = rate.largest_step / 2

    def loss(W):
        error = W - optima
        return np.mean(np.sum(error * (hessians @ error), axis=(1, 2))) / 2

    W, descents = PROBLEM.start, []
    for H in projectors("orthonormal", "left", rank)[0, :30]:
        local = np.broadcast_to(W, optima.shape)
        grads = hessians @ (W - optima)
        for _ in range(local_steps):
            local = local - eta * H @ hessians @ (local - optima)
        mean = grads.mean(axis=0)
        bound = rate.link_bound(
            captured=np.sum((H @ mean) ** 2),
            dissimilarity=np.mean(np.sum((H @ (grads - mean)) ** 2, axis=(1, 2))),
            eta=eta,
        )
        after = local.mean(axis=0)
        assert loss(after) - loss(W) <= bound
        descents.append(bound < 0)
        W = after
    assert all(descents) if local_steps == 1 else any(descents)


def test_links_for_is_where_the_pl_bound_falls_below_the_target():
    rate, start = theory.GdPl(smoothness=2.0, lam=0.1, mu=0.7), {"gap": 3.0, "gamma": 0.5}
    links = rate.links_for(**start, target=1e-5)
    assert rate.bound(**start, links=links) <= 1e-5
    assert rate.bound(**start, links=links - 1) > 1e-5
    assert rate.links_for(**start, target=4.0) == 0
    assert (
        theory.GdPl(smoothness=1, lam=1, mu=1).links_for(gap=1, target=0.1, gamma=1) == 1
    )


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_bernoulli_lambda_is_that_of_the_mean_projector_of_vec(p):
    """On vec W: left projectors are I x H, right ones H x I; p is the left's share."""
    left = projectors("orthonormal", "left", 3).reshape(-1, ROWS, ROWS)
    right = projectors("orthonormal", "right", 3).reshape(-1, COLS, COLS)
    mean = p * np.kron(left.mean(axis=0), np.eye(COLS))
    mean += (1 - p) * np.kron(np.eye(ROWS), right.mean(axis=0))
    found = np.linalg.eigvalsh(mean)
    same = theory.bernoulli_lambda(rows=ROWS, cols=COLS, rank=3, p=p)
    # The eigenvalues at the ends stray by the noise of 4800 draws.
    np.testing.assert_allclose(found[[0, -1]], same, atol=0.04)


def test_lambdas_of_a_tree():
    params = {"a": jnp.zeros((ROWS, COLS)), "b": jnp.zeros(3), "c": jnp.zeros((4, 9))}
    spec = rl.Spec(2, rules=[rl.Rule("c", side="right", rank=3)])
    assert theory.lambdas(params, spec) == {"a": 2 / COLS, "c": 3 / 9}


@pytest.mark.parametrize("law", ["orthonormal", "rademacher"])
def test_estimated_lambda_is_within_its_error(law):
    spec = rl.Spec(3, side="left", sketch=law)

    def draw(key):
        return 7 * rl.sample_sketch(PROBLEM.start, spec, key=key)

    found = theory.estimate_lambda(draw, lam=3 / ROWS, key=0)
    assert 0.5 * 3 / ROWS <= found <= 1.1 * 3 / ROWS


def test_a_law_that_leaves_directions_out_is_refused():
    def half(key):
        return jnp.pad(jax.random.normal(key, (2, 4)), ((0, 0), (0, 4)))

    with pytest.raises(ValueError, match="never"):
        theory.estimate_lambda(half, lam=0.25, key=0)
    with pytest.raises(ValueError, match="gaussian_raw"):
        theory.lambdas(PROBLEM.start, rl.Spec(2, sketch="gaussian_raw"))


def test_smoothness_is_the_largest_curvature_of_a_tree():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((7, 7))
    A = (A + A.T) / 2

    def loss(params, A):
        x = jnp.concatenate([params["a"].ravel(), params["b"]])
        return x @ A @ x / 2

    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(3)}
    want = np.abs(np.linalg.eigvalsh(A)).max()
    found = float(
        theory.smoothness(
            loss, params, jnp.asarray(A, jnp.float32), iterations=200, key=0
        )
    )
    assert 0.999 * want < found < want * (1 + 1e-5)
    with pytest.raises(ValueError, match="'n'"):
        theory.smoothness(loss, {"n": jnp.arange(3)}, key=0)


def test_lazy_check_is_half_the_step_on_a_square():
    # (w + d)^2 - w^2 = 2 w d + d^2, so the rest over the linear part is d / 2 w.
    found = theory.lazy_check(lambda w: {"y": w**2}, jnp.array(2.0), jnp.array(0.4))
    assert float(found) == pytest.approx(0.1, rel=1e-5)


def test_ranks_are_the_smallest():
    assert [theory.ntk_rank(n) for n in (64, 1000, 100_000)] == [11, 45, 447]
    for n in range(1, 200):
        r = theory.ntk_rank(n)
        assert (r - 1) * r <= 2 * n < r * (r + 1)
    r = theory.capacity_rank(100, rows=30, cols=9)
    assert (r - 1) * 39 - (r - 1) ** 2 <= 135 < r * 39 - r**2
    with pytest.raises(ValueError, match="no rank"):
        theory.capacity_rank(100, rows=9, cols=9)


def test_gamma_is_what_a_factor_step_does():
    W = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    spec = rl.Spec(2, alpha=6.0)
    S = rl.sample_sketch(W, spec, key=0)
    factor = rl.project(W, S, spec).value
    step = rl.lift(0.1 * factor, S, W, spec)
    gamma = theory.gamma_of(learning_rate=0.1, scaling=3.0)
    np.testing.assert_allclose(step, gamma * W @ S.T @ S, atol=1e-5)
    assert theory.gamma_of(learning_rate=0.1, scaling=3.0, steps=5) == 5 * gamma


GD = {"smoothness": 2.0, "lam": 0.25}
PL = GD | {"mu": 1.0}
PAGE = GD | {"sample_smoothness": 3.0, "refresh": 0.5, "batch": 4}
BLOCK = {"smoothness": 2.0, "mu": 1.0, "dim": 6, "rank": 3}
BERNOULLI = {"rows": 8, "cols": 4, "rank": 2, "p": 0.5}
BAD = [
    (theory.Gd, GD, {"lam": 0.0}, "lam = 0"),
    (theory.Gd, GD, {"lam": 1.5}, "lam"),
    (
        theory.Gd,
        GD,
        {"smoothness": -1.0},
        "smoothness must be positive and finite, got -1.0",
    ),
    (theory.Gd, GD, {"smoothness": None}, "smoothness must be a number, got None"),
    (theory.GdPl, PL, {"mu": 20.0}, "no function"),
    (theory.GdPl, PL, {"mu": math.nan}, "mu"),
    (theory.Sgd, GD | {"variance": 1.0}, {"variance": -1.0}, "variance"),
    (theory.Sgd, GD | {"variance": 1.0}, {"lam_max": 1.5}, "lam_max"),
    (theory.Page, PAGE, {"refresh": 0.0}, "refresh"),
    (theory.Page, PAGE, {"batch": 0.5}, "batch must be an int, got 0.5"),
    (theory.Page, PAGE, {"sample_smoothness": 1.0}, "sample_smoothness"),
    (theory.Page, PAGE, {"lam_max": 0.1}, "lam_max"),
    (theory.FedRacLora, GD | {"local_steps": 2}, {"local_steps": 0}, "local_steps"),
    (theory.FedRacLora, GD | {"local_steps": 2}, {"lam_max": 0.1}, "lam_max"),
    (theory.Orthogonal, GD | {"rank": 2}, {"rank": "2"}, "rank must be an int"),
    (theory.BlockPl, BLOCK, {"rank": 4}, "does not divide"),
    (theory.bernoulli_lambda, BERNOULLI, {"p": 1.5}, "p must"),
    (theory.bernoulli_lambda, BERNOULLI, {"p": math.nan}, "p must"),
    (theory.bernoulli_lambda, BERNOULLI, {"rank": 5}, "rank"),
]
BAD_RUNS = [
    ({"gap": math.nan}, "gap must be at least 0 and finite, got nan"),
    ({"gap": -1.0}, "gap must be at least 0 and finite, got -1.0"),
    ({"links": 0}, "links must be at least 1"),
    ({"links": 2.5}, "links must be an int"),
    ({"gamma": "0.1"}, "gamma must be a number"),
    ({"gamma": 0.0}, "gamma must be positive"),
    ({"gamma": 5.0}, "largest step"),
]
MVR = theory.Mvr(**GD, sample_smoothness=3.0, weight=0.5, variance=1.0, start_error=1.0)
EF21 = theory.Ef21(**GD, sample_smoothness=3.0, contraction=0.5, start_error=1.0)
RATES = [
    theory.Gd(**GD),
    theory.GdPl(**PL),
    theory.Sgd(**GD, variance=1.0),
    theory.SgdPl(**PL, variance=1.0),
    theory.Page(**PAGE),
    MVR,
    theory.Marina(**GD, sample_smoothness=3.0, refresh=0.5, compression=9.0, clients=4),
    EF21,
]


@pytest.mark.parametrize(("function", "good", "bad", "says"), BAD)
def test_bad_numbers_are_refused_in_one_line(function, good, bad, says):
    function(**good)
    with pytest.raises((ValueError, TypeError), match=says) as refused:
        function(**(good | bad))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("bad", "says"), BAD_RUNS)
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: type(rate).__name__)
def test_bad_runs_are_refused_by_every_rate(rate, bad, says):
    good = {"gap": 1.0, "gamma": 0.1, "links": 10}
    rate.bound(**good)
    with pytest.raises((ValueError, TypeError), match=says) as refused:
        rate.bound(**(good | bad))
    assert "\n" not in str(refused.value)


def test_an_estimate_that_starts_off_raises_its_bound_by_the_weight_of_its_memory():
    run = {"gap": 1.0, "gamma": 0.1, "links": 10}
    for rate, memory in ((MVR, 0.5), (EF21, 1 - math.sqrt(0.5))):
        exact = dataclasses.replace(rate, start_error=0.0).bound(**run)
        # Of phi the error is gamma lam / (2 memory), and the bound 2 phi / (lam gamma T).
        assert rate.bound(**run) == pytest.approx(exact + 1 / (memory * 10))
