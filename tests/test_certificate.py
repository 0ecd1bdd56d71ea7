"""The certificate: shares and their variance, what it catches, what it lets be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import chequered
from jax import lax

import raclora_jax as rl
from raclora_jax import theory
from raclora_jax._core.plan import plan_tree

LAWS = ("orthonormal", "rademacher", "coordinate", "block")
DRAWS = 1500
VIEWS = {
    "left": ((12, 5), rl.Spec(4, side="left")),
    "right": ((5, 14), rl.Spec(3, side="right")),
    "stack": ((3, 10, 6), rl.Spec(4, side="left", rules=[rl.Rule("", batch=0)])),
}


def gradient(shape):
    """A gradient with a few loud rows, so that laws that pick rows have a wide spread."""
    rng = np.random.default_rng(5)
    loud = rng.standard_normal(shape[:-1])[..., None] ** 2
    return jnp.asarray(rng.standard_normal(shape) * loud, jnp.float32)


@pytest.mark.parametrize(("view", "law"), chequered(VIEWS, LAWS))
def test_shares_have_the_mean_and_the_variance_that_is_said(law, view):
    """Means over draws within five standard errors, of shares by NumPy's projectors."""
    shape, spec = VIEWS[view]
    spec = rl.Spec(spec.rank, side=spec.side, rules=spec.rules, sketch=law)
    G = gradient(shape)
    (plan,) = plan_tree(spec, G).values()

    def one(link):
        S, Q = (rl.sample_sketch(G, spec, key=key, link=link) for key in (3, 4))
        factor, probe = (rl.project(G, sketch, spec) for sketch in (S, Q))
        dense = theory.captured(G, S, spec)
        return S, dense, theory.captured_by_probe(factor, probe, G, spec)

    run = jax.jit(jax.vmap(one))
    S, dense, probed = run(jnp.arange(DRAWS))
    explicit = reference.explicit(S, plan)
    matrices = np.asarray(G, np.float64).reshape(-1, *shape[-2:])
    if view == "right":
        matrices = np.swapaxes(matrices, 1, 2)
    held = explicit.reshape(DRAWS, -1, *explicit.shape[-2:]) @ matrices
    shares = np.sum(held**2, axis=(1, 2, 3)) / np.sum(matrices**2)
    np.testing.assert_allclose(dense.share[""], shares, rtol=1e-4)
    np.testing.assert_allclose(dense.energy, shares * np.sum(matrices**2), rtol=1e-4)

    for seen in (dense, probed):
        share, variance = np.asarray(seen.share[""]), np.asarray(seen.variance[""])
        excess = share - plan.lam
        assert abs(excess.mean()) < 5 * share.std() / np.sqrt(DRAWS)
        more = excess**2 - variance
        if seen is dense:
            assert abs(more.mean()) < 5 * more.std() / np.sqrt(DRAWS)
        elif law == "orthonormal":
            # A bound only; of other laws the square itself is taken.
            assert more.mean() < 0


def test_a_gradient_of_rank_one_is_the_widest():
    """Beta((r / 2), (d - r) / 2) is the share of a vector, with a known variance."""
    d, r = 16, 4
    G = jnp.zeros((d, 3)).at[:, 0].set(jnp.arange(1.0, d + 1))
    keys = jax.vmap(jax.random.key)(jnp.arange(300))

    def variance(key):
        spec = rl.Spec(r, side="left")
        return theory.captured(G, rl.sample_sketch(G, spec, key=key), spec).variance[""]

    known = 2 * r * (d - r) / (d**2 * (d + 2))
    np.testing.assert_allclose(np.mean(jax.vmap(variance)(keys)), known, rtol=0.05)


def test_captured_counts_every_trained_leaf_and_scaling():
    params = {"kernel": gradient((8, 5)), "bias": jnp.arange(5.0), "cold": jnp.ones(3)}
    spec = rl.Spec(2, alpha=6.0, rules=[rl.Rule("cold", mode="frozen")])
    S = rl.sample_sketch(params, spec, key=0)
    seen = theory.captured(params, S, spec)
    factor = rl.project(params, S, spec)["kernel"].value
    want = jnp.sum(factor**2) + jnp.sum(params["bias"] ** 2)
    np.testing.assert_allclose(seen.energy, want, rtol=1e-5)
    whole = jnp.sum(params["kernel"] ** 2)
    np.testing.assert_allclose(
        seen.share["kernel"], jnp.sum(factor**2) / 9 / whole, rtol=1e-5
    )
    assert seen.lam["kernel"] == pytest.approx(2 / 5)


def test_tiny_and_zero_gradients_say_nothing_false():
    spec = rl.Spec(2)
    S = rl.sample_sketch(jnp.zeros((6, 5)), spec, key=0)
    tiny, whole = (
        theory.captured(scale * gradient((6, 5)), S, spec) for scale in (1e-25, 1.0)
    )
    np.testing.assert_allclose(tiny.share[""], whole.share[""], rtol=1e-5)
    none = theory.captured(jnp.zeros((6, 5)), S, spec)
    factor = rl.project(jnp.zeros((6, 5)), S, spec)
    neither = theory.captured_by_probe(factor, factor, jnp.zeros((6, 5)), spec)
    for seen in (none, neither):
        link = theory.certify(None, seen, loss_before=1, loss_after=1, learning_rate=0.1)
        assert bool(link.sound)
        assert float(link.z[""]) == pytest.approx(0, abs=1e-3)


# A least-squares problem of two matrices, so that leaves can break apart.
ROWS, COLS, LINKS = 12, 7, 60
RUNS = ("sound", "one sketch", "half", "large step", "nan")


def broken_runs(law, form):
    """``Certificate`` with axes ``(runs, links)``, the library taking every step."""
    rng = np.random.default_rng(2)
    X = jnp.asarray(rng.standard_normal((60, ROWS)), jnp.float32)
    Y = jnp.asarray(rng.standard_normal((60, COLS)), jnp.float32)
    start = {k: jnp.asarray(rng.standard_normal((ROWS, COLS)), jnp.float32) for k in "ab"}
    L = float(np.linalg.eigvalsh(X.T @ X / 60)[-1])
    spec = rl.Spec(3, side="left", sketch=law, resample_every=1)
    half = jax.tree.map(lambda W: W[: ROWS // 2], start)

    def loss(W):
        errors = [X @ W["a"] - Y, X @ W["b"] + Y]
        return sum(jnp.sum(e**2) for e in errors) / 120

    probed = theory.probe(loss, spec, key=0)

    def one(which):
        rate = jnp.where(which == RUNS.index("large step"), 4.0, 0.95) / L

        def step(carry, link):
            W, previous = carry
            drawn = jnp.where(which == RUNS.index("one sketch"), 0, link)
            S = rl.sample_sketch(W, spec, key=0, link=drawn)
            small = rl.sample_sketch(half, spec, key=0, link=drawn)
            if law in ("orthonormal", "rademacher"):
                small = jax.tree.map(
                    lambda s: jnp.pad(s, ((0, 0), (0, ROWS // 2))), small
                )
            whole = which != RUNS.index("half")
            S = jax.tree.map(lambda s, t: jnp.where(whole, s, t), S, small)
            G = jax.grad(loss)(W)
            factors = rl.project(G, S, spec)
            seen = (
                theory.captured(G, S, spec)
                if form == "dense"
                else theory.captured_by_probe(factors, probed(W, link), W, spec)
            )
            delta = rl.lift(factors, S, W, spec)
            after = jax.tree.map(lambda W, D: W - rate * D, W, delta)
            lost = (which == RUNS.index("nan")) & (link == 5)
            after = jax.tree.map(lambda W: jnp.where(lost, jnp.nan, W), after)
            certificate = theory.certify(
                previous,
                seen,
                loss_before=loss(W),
                loss_after=loss(after),
                learning_rate=rate,
            )
            return (after, certificate), certificate

        carry, first = step((start, None), jnp.zeros((), jnp.int32))
        _, rest = lax.scan(step, carry, jnp.arange(1, LINKS))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    run = jax.jit(jax.vmap(one))
    return jax.tree.map(np.asarray, run(jnp.arange(len(RUNS))))


@pytest.mark.parametrize(
    ("law", "form"),
    [("orthonormal", "dense"), ("block", "dense"), ("orthonormal", "probe")],
)
def test_broken_runs_are_caught_and_a_sound_one_is_not(law, form):
    found = broken_runs(law, form)
    first = dict(zip(RUNS, np.argmax(~found.sound, axis=1), strict=True))
    assert found.sound[RUNS.index("sound")].all()
    assert not found.sound[1:].all(axis=1).any()
    for name, link in first.items():
        assert link < 20, name
    # Descent alone passes both runs that do not cover.
    for name in ("one sketch", "half"):
        run = RUNS.index(name)
        assert found.descends[run].all()
        assert not found.covers[run].all()
    large, nan = RUNS.index("large step"), RUNS.index("nan")
    assert not found.descends[large, 0]
    assert found.finite[nan, :5].all()
    assert not found.finite[nan, 5:].any()


def certificate(**changes):
    half = {"a": jnp.array(0.5), "b": jnp.array(0.5)}
    share = half | changes.pop("share", {})
    seen = theory.Captured(jnp.array(1.0), share, half, {"a": 0.01, "b": 0.01})
    seen = jax.tree.map(jnp.asarray, seen)
    numbers = {"loss_before": 2.0, "loss_after": 1.0, "learning_rate": 0.1} | changes
    return theory.certify(None, seen, **numbers)


def test_report_says_what_broke():
    sound = certificate()
    said = {
        "sound: 1 links": [sound],
        "link 1 does not descend": [certificate(loss_after=1.99)],
        "link 1 is not finite": [certificate(loss_after=np.nan)],
        "the gradient of 'b'": [certificate(share={"b": jnp.array(jnp.nan)})],
        "link 1 does not cover 'b'": [sound, certificate(share={"b": jnp.array(0.05)})],
        "all together": [certificate(share={k: jnp.array(0.2) for k in "ab"})],
    }
    for words, links in said.items():
        line = theory.report(links)
        assert words in line
        assert "\n" not in line


def test_noise_and_rounding_are_forgiven():
    assert not certificate(loss_after=2.01).descends
    assert certificate(loss_after=2.01, noise=0.02).descends
    assert certificate(loss_after=2.0 + 1e-6, learning_rate=0.0).descends
    assert not certificate(loss_after=2.0 + 1e-5, learning_rate=0.0).descends


def test_report_draws(tmp_path):
    pytest.importorskip("matplotlib")
    links = [certificate(), certificate()]
    theory.report(links, bound=[1.0, 0.5], out=tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="bound has 1"):
        theory.report(links, bound=[1.0])
    with pytest.raises(ValueError, match="one link"):
        theory.report([])


def test_what_does_not_belong_together_is_refused():
    W = {"a": gradient((6, 5)), "b": gradient((6, 5))}
    spec, alone = rl.Spec(2), {"a": gradient((6, 5))}
    S = rl.sample_sketch(W, spec, key=0)
    seen = theory.captured(W, S, spec)
    first = certificate()
    numbers = {"loss_before": 1.0, "loss_after": 1.0, "learning_rate": 0.1}
    theory.certify(first, seen, **numbers)
    other = theory.captured(alone, {"a": S["a"]}, spec)
    with pytest.raises(ValueError, match="'b'"):
        theory.certify(first, other, **numbers)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="learning_rate"):
            theory.certify(None, seen, **(numbers | {"learning_rate": bad}))
    with pytest.raises(ValueError, match="'b'"):
        theory.captured(W, {"a": S["a"]}, spec)
    factors = rl.project(W, S, spec)
    with pytest.raises(ValueError, match="probed"):
        theory.captured_by_probe(factors, {"a": factors["a"]}, W, spec)
    with pytest.raises(ValueError, match="gaussian_raw"):
        theory.captured(W, S, rl.Spec(2, sketch="gaussian_raw"))


def test_a_probe_is_a_factor_gradient_that_no_link_uses():
    W, spec = {"a": gradient((6, 5))}, rl.Spec(2, resample_every=1)

    def loss(W, x):
        return jnp.sum((x @ W["a"]) ** 2)

    x = gradient((4, 6))
    found = [theory.probe(loss, spec, key=0)(W, link, x)["a"].value for link in (0, 1)]
    tx = rl.raclora(0.1, spec, inner=optax.identity(), key=0)
    own = rl.grad(loss, spec)(W, tx.init(W), x)["a"].value
    G = jax.grad(loss)(W, x)["a"]
    for factor in (*found, own):
        # In the row space of an orthonormal sketch: no longer than the gradient.
        assert 0 < float(jnp.sum(factor**2)) < float(jnp.sum(G**2))
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[0], own)
