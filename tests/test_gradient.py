"""Every way a loss can use a weight: the gradient is the dense one, projected.

The oracle is ``project(jax.grad(loss)(params, *args), sample_sketch(...))``. Each case of
``cases.py`` is held against it on either side, and against its list of fallbacks.
"""

from __future__ import annotations

import re
import warnings

import cases
import jax
import jax.extend.core as jex
import pytest
from agreement import (
    KEY,
    SIDES,
    assert_reported,
    assert_same,
    fallbacks,
    gradient,
    sketches,
)
from cases import CASES
from helpers import chequered

import raclora_jax as rl

pytestmark = pytest.mark.usefixtures("quick_draws")

TURNS = ((("left", 1), ("right", 3)), (("left", 3), ("right", 1)))


def check(case, settings, tolerance):
    """Holds one case against the oracle, every (side, rank) in one program."""
    params, args = case.inputs()
    specs = [case.spec(rank, side, *law) for side, rank, *law in settings]

    def both(params, *args):
        value, dense = jax.value_and_grad(case.loss, has_aux=case.has_aux)(params, *args)
        pairs = []
        for spec in specs:
            ours = gradient(case.loss, params, spec, *args, has_aux=case.has_aux)
            pairs.append((ours, rl.project(dense, sketches(params, spec), spec)))
        return value, pairs

    (value, pairs), messages = fallbacks(jax.jit(both), params, *args)
    tolerance = max(tolerance, case.tolerance)
    for spec, ((our_value, ours), expected) in zip(specs, pairs, strict=True):
        where = f"{spec.side}, rank {spec.rank}"
        for path in cases.ADAPTED:
            assert path not in params or isinstance(ours[path], rl.Factor), where
        assert_same(our_value, value, tolerance, where)
        assert_same(ours, expected, tolerance, where)
    if case.falls:
        assert len(messages) == len(specs)
    assert_reported(case, messages)


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
def test_case(name):
    """A law of real numbers and one that picks rows, each on a side, since it takes long.

    Of ranks 1 and 3 each has one, in turn, and so have blocks that are slices, that wrap
    around, and rows gathered one by one.
    """
    whole, _, picked = settings_of(name)
    with jax.enable_x64(True):
        check(CASES[name], [whole, picked], 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_case_on_both_sides(name):
    with jax.enable_x64(True):
        check(CASES[name], settings_of(name), 1e-13)


def settings_of(name):
    """Side, rank and law of three runs; the last picks rows on the first's other side."""
    index = list(CASES).index(name)
    laws = (2, "block"), (3, "block"), (3, "coordinate")
    first, second = TURNS[index % 2][:: 1 if index % 4 < 2 else -1]
    other = SIDES[1 - SIDES.index(first[0])]
    return first, second, (other, *laws[index // 2 % 3])


NEW = [
    name for name in CASES if name in cases.MODELS or re.search("concat|one more", name)
]


@pytest.mark.parametrize(
    ("law", "name"),
    chequered(
        ["gaussian_raw", "block"],
        [*NEW, "leaf times its transpose", "ragged_dot, axes merged"],
    ),
)
def test_case_away_from_zero(name, law):
    """The adapter form, where the factors have a value: against the merged weights."""
    with jax.enable_x64(True):
        case = CASES[name]
        params, args = case.inputs()
        spec = case.spec(2, SIDES[len(name) % 2], law)
        factors, chain = rl.init_adapter(params, spec, key=KEY)
        keys = iter(jax.random.split(jax.random.key(5), len(params)))
        factors = jax.tree.map(
            lambda f: jax.random.normal(next(keys), f.shape) / 5, factors
        )

        def apart(factors):
            return rl.adapted(case.loss, spec)(factors, params, chain, *args)

        def merged(factors):
            return case.loss(rl.effective_params(params, factors, chain, spec), *args)

        def both(factors):
            return [jax.value_and_grad(loss)(factors) for loss in (apart, merged)]

        (ours, expected), messages = fallbacks(jax.jit(both), factors)
        # The factors of this form are float32.
        assert_same(ours, expected, 1e-7, name)
        assert_reported(case, messages)


def products(program):
    """Shapes that products give and that concatenations take, inside calls too."""
    made, joined = [], set()
    for eqn in program.eqns:
        shapes = [var.aval.shape for var in eqn.outvars]
        made += shapes if eqn.primitive.name == "dot_general" else []
        joined |= {*shapes} if eqn.primitive.name == "concatenate" else set()
        for inside in jex.jaxprs_in_params(eqn.params):
            more, wider = products(inside)
            made, joined = made + more, joined | wider
    return made, joined


@pytest.mark.smoke
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "name", ["LSTM of linen", "GRU of linen", "two leaves concatenated"]
)
def test_no_gradient_of_leaves_side_by_side_is_formed(name, side):
    case = CASES[name]
    params, args = case.inputs()
    spec = case.spec(2, side)

    def ours(params, *args):
        return gradient(case.loss, params, spec, *args)

    def made(function):
        products_of, _ = products(jax.make_jaxpr(function)(params, *args).jaxpr)
        return {tuple(sorted(shape)) for shape in products_of}

    _, joined = products(jax.make_jaxpr(case.loss)(params, *args).jaxpr)
    matrices = {leaf.shape for leaf in params.values() if leaf.ndim > 1}
    shapes = {tuple(sorted(shape)) for shape in matrices | joined}
    assert made(jax.grad(case.loss)) & shapes
    assert not made(ours) & shapes


@pytest.mark.parametrize(
    ("name", "side"), chequered([name for name in CASES if "ragged_dot" in name], SIDES)
)
def test_rows_picked_for_each_group(name, side):
    with jax.enable_x64(True):
        check(CASES[name], [(side, 2, "block"), (side, 2, "coordinate")], 1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("name", cases.MODELS)
def test_a_model_is_traced(name):
    """The views read off a model are those its gradient is held against."""
    case = CASES[name]
    params, args = case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans = rl.plan(rl.trace_spec(case.loss, params, *args, rank=2), params)
    for path, plan in rl.plan(case.spec(2, "smaller"), params).items():
        seen = plans[path]
        assert (seen.mode, seen.rows, seen.batch) == (plan.mode, plan.rows, plan.batch), (
            path
        )


# Every sixth will do: what may differ is dtypes, not rules.
@pytest.mark.parametrize("name", list(CASES)[::6])
def test_case_in_float32(name):
    with jax.enable_x64(False):
        check(CASES[name], [(SIDES[len(name) % 2], 2)], 1e-5)
