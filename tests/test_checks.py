"""Numbers, words and flags are refused in one wording, whichever module is asked."""

import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raclora_jax as rl
from raclora_jax import estimators, federated, methods, theory
from raclora_jax._core import checks

RANGES = {
    checks.POSITIVE: ([1e-300, 1, 1e300], [0, -1, math.inf]),
    checks.NOT_NEGATIVE: ([0, 1e300], [-1e-300, math.inf]),
    checks.PROBABILITY: ([0, 0.5, 1], [-1e-9, 1.01]),
    checks.SHARE: ([1e-9, 1], [0, 1.01]),
    checks.DECAY: ([0, 0.999], [-0.1, 1]),
}
NO_NUMBERS = [True, np.bool_(True), None, "1", [1.0], np.ones(1), 1j, jnp.ones(2)]


@pytest.mark.parametrize("within", RANGES, ids=[within.words for within in RANGES])
def test_ranges(within):
    good, bad = RANGES[within]
    for value in good:
        assert checks.number("x", value, within) == value
        checks.scalar("x", value, within)
    for value in (*bad, math.nan):
        message = re.escape(f"x must be {within.words}, got {float(value)}; write y")
        for check in (checks.number, checks.scalar):
            with pytest.raises(ValueError, match=f"^{message}$"):
                check("x", value, within, way_out="write y")


@pytest.mark.parametrize("make", [float, np.float32, jnp.float32, np.asarray, Fraction])
def test_what_is_a_number(make):
    assert checks.number("x", make(0.5), checks.SHARE) == 0.5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    for check in (checks.number, checks.scalar):
        with pytest.raises(
            TypeError, match=r"^x must be a number or None, got .* of type"
        ):
            check("x", value, checks.SHARE, expected="a number or None")


def test_a_traced_number_is_taken_where_none_has_to_know_it():
    def scalar(x):
        checks.scalar("x", x, checks.SHARE)
        return x

    assert jax.jit(scalar)(2.0) == 2.0
    with pytest.raises(TypeError, match="x must be a number"):
        jax.jit(scalar)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"x must be a number, got .*Tracer"):
        jax.jit(lambda x: checks.number("x", x, checks.SHARE))(1.0)


def test_counts():
    for value in (3, np.int64(3), jnp.int32(3)):
        assert checks.count("n", value, most=3) == 3
    for value in (True, 3.0, "3", None):
        with pytest.raises(TypeError, match=r"^n must be an int, got .* of type"):
            checks.count("n", value)
    with pytest.raises(ValueError, match=r"^n must be at least 1, got 0$"):
        checks.count("n", 0)
    with pytest.raises(ValueError, match=r"^n must be at most 3, got 4; there are 3$"):
        checks.count("n", 4, most=3, way_out="there are 3")


@pytest.mark.parametrize(
    "call",
    [
        lambda: rl.Spec(0),
        lambda: rl.Rule("x", alpha="8"),
        lambda: rl.raclora(None, 2, key=0),
        lambda: rl.raclora(0.1, 2, weight_decay=True, key=0),
        lambda: rl.raclora(0.1, 2, clip_norm=jnp.float32(-1.0), key=0),
        lambda: rl.orthogonal(momentum=1.0),
        lambda: rl.clip_by_matrix_norm(0.0),
        lambda: estimators.mvr(jnp.float32(2.0)),
        lambda: methods.flora(0.1, 2, momentum=None, key=0),
        lambda: methods.golore(0.1, 2, random_from=0.5, key=0),
        lambda: methods.sora(0.1, 2, threshold="0", key=0),
        lambda: methods.lora_pro(0.1, 2, form="lion", key=0),
        lambda: federated.raclora(2, rounds_per_link=True),
        lambda: federated.Privacy(clip=1.0, noise_multiplier=1.0, take=2.5, key=0),
        lambda: federated.sample_clients(5, 6, round=0, key=0),
        lambda: federated.qgd("half"),
        lambda: theory.FedRacLora(smoothness=True, local_steps=1, lam=0.5),
        lambda: theory.FedRacLora(smoothness=1.0, local_steps=0, lam=0.5),
    ],
)
def test_every_module_says_it_alike(call):
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    wording = r"([^:]+: )?\w+ must be [^;]+, got [^;]+(; .+)?"
    assert re.fullmatch(wording, str(refused.value)), refused.value


@pytest.mark.parametrize(
    "make",
    [
        lambda spec: methods.lora(0.1, spec, key=0),
        lambda spec: methods.galore(0.1, spec),
        federated.raclora,
    ],
)
@pytest.mark.parametrize(
    ("where", "spec"),
    [
        ("Spec", rl.Spec(2, side=0.5)),
        ("Rule('x')", rl.Spec(2, rules=[rl.Rule("x", side=0.5), rl.Rule("x")])),
    ],
)
def test_a_side_that_is_drawn_is_refused_alike(make, where, spec):
    with pytest.raises(ValueError, match="draws the side for each link") as refused:
        make(spec)
    assert str(refused.value).startswith(f"{where}: side=0.5 ")
    assert str(refused.value).endswith("; give side='left', 'right' or 'auto'")
