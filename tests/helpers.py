"""What many test modules do, written once."""

import itertools

import jax
import numpy as np
import pytest

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # once a program


def compiled_once(jitted):
    """``jitted``, whose calls fail where one after the first compiles again.

    Compilations are counted as JAX tells of them. The size of a function's own cache
    stays zero in a process that has compiled more than some thousand functions.
    """
    calls = itertools.count()

    def call(*args, **kwargs):
        lowered = []

        def listen(event, _, **about):
            lowered.extend([about] if event == LOWERED else [])

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            answer = jitted(*args, **kwargs)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        if next(calls) == 0:
            assert lowered, "the first call compiles: was it called before?"
        else:
            assert not lowered, f"compiled again: {lowered}"
        return answer

    return call


def repeat(*values):
    """A case of seconds, for what a quicker case or another test shows too."""
    return pytest.param(*values, marks=pytest.mark.slow)


def with_repeats(cases, *repeats):
    """Cases for ``parametrize``, some of which are repeats."""
    cases = list(cases)
    gone = [case for case in repeats if case not in cases]
    assert not gone, f"no such cases: {gone}"
    values = {case: case if isinstance(case, tuple) else (case,) for case in repeats}
    return [repeat(*values[case]) if case in repeats else case for case in cases]


def product(*axes, repeats):
    """All combinations, some of which are repeats."""
    return with_repeats(itertools.product(*axes), *repeats)


def chequered(*axes):
    """All combinations, every other one a repeat, as the squares of one colour."""
    numbered = itertools.product(*map(enumerate, axes))
    pairs = [tuple(zip(*case, strict=True)) for case in numbered]
    return [case if sum(at) % 2 == 0 else repeat(*case) for at, case in pairs]


def refuses(call, *pieces, error=(ValueError, TypeError)):
    """``call`` raises ``error`` with every piece in its message, which is returned."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    missing = [piece for piece in pieces if piece not in message]
    assert not missing, f"{missing} not in {message!r}"
    return message


def assert_close(found, expected, atol=1e-5):
    """Equal structures, and every number to ``atol``."""

    def close(path, one, other):
        one, other = (np.asarray(leaf, np.float64) for leaf in (one, other))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)

    jax.tree.map_with_path(close, found, expected)


def assert_same_bits(found, expected):
    """Equal structures, shapes, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def same(path, one, other):
        name = jax.tree_util.keystr(path)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), name

    jax.tree.map_with_path(same, found, expected)


def states_of(method, params, loss_fn, *batch, steps):
    """The states of a method of the field, before and after every step."""
    step = jax.jit(lambda state: method.step(state, loss_fn, *batch)[0])
    states = [method.init(params)]
    for _ in range(steps):
        states.append(step(states[-1]))
    return states
