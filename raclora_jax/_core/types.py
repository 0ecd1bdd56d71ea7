"""Names for the types that signatures repeat, and the words a spec knows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

# A tree of arrays; JAX knows no narrower type for one.
PyTree: TypeAlias = Any
# How to build one again from its leaves.
TreeDef: TypeAlias = jax.tree_util.PyTreeDef
# A leaf of one: an array, an abstract array, or what another library keeps for one.
Leaf: TypeAlias = Any
Leaves: TypeAlias = dict[str, Leaf]
KeyLike: TypeAlias = Array | int
# The state of an optax transformation, whatever it is.
OptState: TypeAlias = Any
# ``loss_fn(params, *args)``.
LossFn: TypeAlias = Callable[..., Any]
Scalar: TypeAlias = Array | np.ndarray | float
# The name of an axis among the axes of several arrays.
Label: TypeAlias = Hashable
# That of the axis along which a sketch and its factor are contracted.
RANK: tuple[()] = ()
# A sketch of a leaf: an array, or ``Picks`` of a law that picks rows; ``BothSketches``
# where the side is drawn.
Drawn: TypeAlias = Any
# A factor of a leaf: an array, or ``BothFactors`` where the side is drawn.
FactorValue: TypeAlias = Any

Alpha: TypeAlias = float | Literal["dim"] | None
Mode = Literal["lowrank", "full", "dense", "frozen"]
Side = Literal["left", "right", "auto", "smaller"]
# A side, or the probability with which a link takes the left one.
SideOrChance: TypeAlias = Side | float
Sketch = Literal["orthonormal", "rademacher", "coordinate", "block", "gaussian_raw"]
Rounding = Literal["auto", "nearest", "stochastic", "master"]
Rest = Literal["dense", "frozen"]
Moments = Literal["reset", "keep", "transport"]
Cause = Literal["rule", "matrix", "no matrix", "rank"]


def is_number(dtype: str) -> bool:
    """Whether a dtype, by its name, is one of numbers: keys and float0 are none."""
    return not dtype.startswith(("key<", "float0"))


def widened(dtype: DTypeLike) -> jnp.dtype:
    """A dtype, or float32 where it is narrower.

    Not ``jnp.promote_types``, which refuses this under strict dtype promotion.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
