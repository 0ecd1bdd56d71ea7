"""RAC-LoRA in slow NumPy, float64, written from the paper and from nothing else.

The oracle of the tests. It shares no code with the package and is given the sketches as
arrays; everything else, views and sides included, it works out with ``transpose``,
``reshape`` and loops over single matrices. Equations are those of Malinovsky et al.,
`Randomized Asymmetric Chain of LoRA <https://arxiv.org/abs/2410.08305>`_, 2024:

  Eq. 3, left sketch   W <- W - gamma H G,   H = B (B^T B)^+ B^T,   B = S
  Eq. 4, right sketch  W <- W - gamma G H,   H = A^T (A A^T)^+ A,   A = S^T

with S tall (dim x rank), G the gradient, gamma = learning_rate * scaling^2.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one leaf is read and trained; axes must not be negative.

    ``side`` is ``"left"`` or ``"right"`` for an adapted leaf, ``"dense"`` or
    ``"frozen"`` for others.
    """

    side: str
    rows: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    scaling: float = 1.0

    @property
    def adapted(self):
        return self.side in ("left", "right")


class Identity:
    """Gradient descent."""

    def __call__(self, gradient):
        return gradient


class Momentum:
    """Heavy ball, m <- decay m + g."""

    def __init__(self, decay):
        self.decay, self.m = decay, 0.0

    def __call__(self, gradient):
        self.m = self.decay * self.m + gradient
        return self.m


class Adam:
    """Kingma & Ba 2015, Algorithm 1; bias correction counts from its own start."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m, self.v, self.t = 0.0, 0.0, 0

    def __call__(self, gradient):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * gradient
        self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
        m_hat = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - self.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


class Lion:
    """Chen et al. 2023, Program 1: the sign of one average, the memory of another."""

    def __init__(self, b1, b2):
        self.b1, self.b2, self.m = b1, b2, 0.0

    def __call__(self, gradient):
        direction = np.sign(self.b1 * self.m + (1 - self.b1) * gradient)
        self.m = self.b2 * self.m + (1 - self.b2) * gradient
        return direction


class Orthogonal:
    """Odd polynomials of the singular values, then a root mean square of 1.

    Vectors are no factors, and get Adam.
    """

    def __init__(self, polynomials, momentum=0.0):
        self.polynomials, self.momentum, self.m = polynomials, momentum, 0.0
        self.adam = Adam(0.9, 0.999, 1e-8)

    def __call__(self, gradient):
        if np.ndim(gradient) < 2:
            return self.adam(gradient)
        self.m = self.momentum * self.m + gradient
        ahead = self.momentum * self.m + gradient
        left, values, right = np.linalg.svd(ahead, full_matrices=False)
        values = values / np.linalg.norm(values, 8)
        for a, b, c in self.polynomials:
            values = a * values + b * values**3 + c * values**5
        return np.sqrt(max(gradient.shape)) * (left * values) @ right


def explicit(sketch, plan):
    """The sketch of a leaf as ``(batch..., rank, *sizes)``, also where rows are picked.

    A block is as many runs as the axes before the last have places, if they fit; else 1,
    2, 4 or 8 of at least 8 rows each. Where the rank does not divide the side it is one
    run that may go on at the start.
    """
    sizes, rank = [plan.shape[axis] for axis in plan.sketched_axes], plan.rank
    if plan.law not in ("block", "coordinate"):
        return np.asarray(sketch)
    dim, leading = math.prod(sizes), math.prod(sizes[:-1])
    picks = np.asarray(sketch.index)
    if plan.law == "coordinate":
        rows = picks
    else:
        runs = 1
        if dim % rank == 0:
            fits = [n for n in (1, 2, 4, 8) if rank % n == 0 and rank // n >= 8]
            runs = max(fits, default=1)
            if leading > 1 and rank % leading == 0:
                runs = leading
        each = np.arange(rank // runs)
        within = (picks[..., None] + each) % (dim // runs)
        rows = [part * (dim // runs) + within for part in range(runs)]
        rows = np.concatenate(rows, axis=-1)
    return np.eye(dim)[rows].reshape(*rows.shape, *sizes)


def matrices(array, leaf):
    """The leaf as a list of (rows x cols) matrices, one for each place in the stack."""
    array = np.asarray(array, np.float64)
    cols = [a for a in range(array.ndim) if a not in leaf.rows + leaf.batch]
    height = math.prod(array.shape[a] for a in leaf.rows)
    width = math.prod(array.shape[a] for a in cols)
    order = [*leaf.batch, *leaf.rows, *cols]
    return list(np.transpose(array, order).reshape(-1, height, width))


def from_matrices(stack, shape, leaf):
    """The inverse of ``matrices`` for a leaf of the given shape."""
    cols = [a for a in range(len(shape)) if a not in leaf.rows + leaf.batch]
    order = [*leaf.batch, *leaf.rows, *cols]
    array = np.stack(stack).reshape([shape[a] for a in order])
    return np.transpose(array, np.argsort(order))


def tall(sketch, leaf):
    """The sketch as a list of (dim x rank) matrices."""
    sketch = np.asarray(sketch, np.float64)
    stack = math.prod(sketch.shape[: len(leaf.batch)])
    rank = sketch.shape[len(leaf.batch)]
    return [one.T for one in sketch.reshape(stack, rank, -1)]


def projector(s):
    """H of Eq. 3 and 4 for a tall sketch: the orthogonal projector on its span."""
    return s @ np.linalg.pinv(s.T @ s) @ s.T


def factor_direction(gradient, s, leaf, rule):
    """One matrix, one step in factor coordinates: scaling * lift(rule(project(G)))."""
    if leaf.side == "left":
        return leaf.scaling * s @ rule(leaf.scaling * s.T @ gradient)
    return leaf.scaling * rule(leaf.scaling * gradient @ s) @ s.T


def dense_direction(gradient, s, leaf, rule):
    """The same with a dense projector, right for any rule that is linear in G.

    With an orthonormal sketch and no memory this is Eq. 3 and 4 to the letter.
    """
    h = projector(s)
    projected = h @ gradient if leaf.side == "left" else gradient @ h
    return leaf.scaling**2 * rule(projected)


def trajectory(
    params,
    leaves,
    sketches,
    gradient,
    make_rule,
    *,
    learning_rate,
    resample_every,
    steps,
    decay=None,
    direction=factor_direction,
):
    """The weights after every step, a list of ``{path: array}``.

    ``leaves`` is ``{path: Leaf}``, or a list of such by link where sides are drawn,
    ``sketches`` a list of ``{path: sketch}`` by link,
    ``gradient(weights, step)`` gives ``{path: array}``, ``learning_rate`` is a function
    of the step, ``decay`` is ``{path: decoupled weight decay}``. Every matrix of a stack
    and every leaf has a rule of its own; a new link starts those of adapted leaves
    again, and dense leaves (biases, norms) go on.
    """
    weights = {path: np.array(w, np.float64) for path, w in params.items()}
    by_link = (
        leaves if isinstance(leaves, list) else [leaves] * -(-steps // resample_every)
    )
    rules = {
        path: [make_rule() for _ in matrices(weights[path], leaf)]
        for path, leaf in by_link[0].items()
    }
    history = []
    for step in range(steps):
        link, since = divmod(step, resample_every)
        gradients = gradient(weights, step)
        after = {}
        for path, leaf in by_link[link].items():
            weight, grad = weights[path], np.asarray(gradients[path], np.float64)
            if leaf.side == "frozen":
                after[path] = weight
                continue
            if leaf.side == "dense":
                moved = rules[path][0](grad)
            else:
                if since == 0:
                    rules[path] = [make_rule() for _ in rules[path]]
                parts = zip(
                    matrices(grad, leaf),
                    tall(sketches[link][path], leaf),
                    rules[path],
                    strict=True,
                )
                moved = [direction(g, s, leaf, rule) for g, s, rule in parts]
                moved = from_matrices(moved, grad.shape, leaf)
            shrink = decay[path] * weight if decay else 0.0
            after[path] = weight - learning_rate(step) * (moved + shrink)
        weights = after
        history.append(weights)
    return history


def page_estimates(gradients, at_previous, full):
    """PAGE, Li et al. 2021, Algorithm 1: g = G where full, else g + G - G'."""
    estimates = []
    for new, before, takes in zip(gradients, at_previous, full, strict=True):
        estimates.append(new if takes else estimates[-1] + new - before)
    return estimates


def mvr_estimates(gradients, at_previous, weight):
    """STORM, Cutkosky and Orabona 2019, line 8: g = G + (1 - b) (g - G')."""
    estimates = [gradients[0]]
    for new, before in zip(gradients[1:], at_previous[1:], strict=True):
        estimates.append(new + (1 - weight) * (estimates[-1] - before))
    return estimates


def momentum_in_new_span(lifted, new, leaf):
    """Where a lifted momentum lands when a new sketch takes over: its projection."""
    moved = []
    for m, s in zip(matrices(lifted, leaf), tall(new, leaf), strict=True):
        h = projector(s)
        moved.append(h @ m if leaf.side == "left" else m @ h)
    return from_matrices(moved, np.shape(lifted), leaf)
