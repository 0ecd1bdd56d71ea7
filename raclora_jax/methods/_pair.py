"""Methods that train a pair of factors beside frozen weights.

One factor of each adapted leaf is drawn, the other starts at zero; in the words of the
plan, the drawn one has the shape of the sketch and the other that of the factor. What
tells one method from another is in its ``Pieces``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import ADAM, as_rule, knowing
from raclora_jax._core import paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.lowrank import formed, lift_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec, check_side_is_fixed
from raclora_jax._core.types import KeyLike, LossFn, PyTree
from raclora_jax._forms.unmerged import unmerged
from raclora_jax.methods._method import Method, nbytes, rate_at, size
from raclora_jax.methods._pair_state import (
    Groups,
    PairState,
    by_name,
    of_pairs,
    only,
    paths_of,
    where,
)
from raclora_jax.methods._pieces import Pair, Pieces


def pair_method(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    pieces: Pieces,
    *,
    key: KeyLike,
) -> Method:
    """A method that trains a pair of factors beside frozen weights, made of pieces.

    The weight is ``W + scaling * drawn * zero``. Of each adapted leaf one factor is drawn
    by the spec's law and the other starts at zero; forward pass beside the weight, links
    of a chain, leaves trained in full and the bytes of moments are taken care of.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks, scaling, law of the drawn factor and length of a link.
      pieces: Where the method departs from LoRA.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. With a subset its trained numbers are those of the largest leaves
      that may be chosen together. ``init`` raises ``ValueError`` if no leaf has a pair,
      or a leaf does not suit the method.

    Raises:
      ValueError: If the spec draws the side.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> signs = Pieces(inner=optax.scale_by_sign(), train_drawn=False)
      >>> method = pair_method(1e-3, Spec(2), signs, key=0)
      >>> method.trained({"kernel": jnp.zeros((6, 4))})
      12
    """
    spec, data = as_spec(spec), key_data(key)
    check_side_is_fixed(
        spec, "a pair, unlike methods.raclora, has one drawn and one zero factor for good"
    )
    made = PairMethod(learning_rate, spec, data, pieces)
    return Method(made.init, made.step, made.params, made.trained, made.optimizer_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class PairMethod:
    """The functions of a ``Method``, on what ``pair_method`` was given."""

    learning_rate: optax.ScalarOrSchedule
    spec: Spec
    data: Array
    pieces: Pieces

    def init(self, params: PyTree) -> PairState:
        leaves, treedef = paths.flatten(params)
        base = paths.unflatten(treedef, {p: jnp.asarray(w) for p, w in leaves.items()})
        plans = self.plans(base)
        pairs = self.begin(base, 0)
        if self.pieces.start is not None:
            base, pairs = self.started(base, plans, pairs)
        groups = by_name(pairs)
        dense = {
            path: jnp.zeros(plan.shape, plan.wide_dtype)
            for path, plan in plans.items()
            if plan.mode == "dense"
        }
        drawn, zero = groups.pop("drawn"), groups.pop("zero")
        subset = self.pieces.subset
        chosen = () if subset is None else subset.init(len(zero))
        count = jnp.zeros((), jnp.int32)
        state = PairState(base, drawn, zero, groups, dense, {}, chosen, count)
        if self.pieces.cases is not None:
            # Leaves that give no choice are refused here, before any compute.
            self.pieces.cases.live(paths_of(self.groups(state)))
        return state._replace(inner=self.begin_rules(plans, state))

    def plans(self, base: PyTree) -> dict[str, LeafPlan]:
        """Plans whose drawn factor is an array, whatever law it came from."""
        return {
            path: dataclasses.replace(plan, law="")
            for path, plan in plan_tree(self.spec, base).items()
        }

    def started(
        self, base: PyTree, plans: dict[str, LeafPlan], pairs: dict[str, Pair]
    ) -> tuple[PyTree, dict[str, Pair]]:
        """Pairs that begin as the method says, and what they leave of the weights."""
        assert self.pieces.start is not None
        leaves, treedef = paths.flatten(base)
        own: dict[str, Pair] = {}
        for path, pair in pairs.items():
            plan, weight = plans[path], leaves[path]
            wide = weight.astype(plan.wide_dtype)
            own[path] = pair | self.pieces.start(plan, wide)
            drawn, factor = self.beside(plan, own[path])
            leaves[path] = (wide - lift_leaf(factor, drawn, plan)).astype(weight.dtype)
        return paths.unflatten(treedef, leaves), own

    def begin(self, base: PyTree, link: Array | int) -> dict[str, Pair]:
        """The pairs of a new link."""
        leaves, _ = paths.flatten(base)
        plans = plan_tree(self.spec, base)
        adapted = {path: plan for path, plan in plans.items() if plan.adapted}
        if not adapted:
            shown = ", ".join(f"{paths.show(p)} is {plans[p].mode}" for p in plans)
            raise ValueError(
                f"no leaf is left for a pair: {shown}; adapt one in the spec"
            )
        for plan in adapted.values():
            if self.pieces.check is not None:
                self.pieces.check(plan)
        pairs: dict[str, Pair] = {}
        own = self.pieces.number
        number = link if own is None else own(jnp.asarray(link))
        for path, sketch in draw_all(self.data, number, adapted.values()).items():
            plan = adapted[path]
            zero = jnp.zeros(plan.factor_shape, plan.wide_dtype)
            pairs[path] = {"drawn": formed(sketch, plan), "zero": zero}
            if self.pieces.extra is not None:
                key = jax.random.fold_in(leaf_key(self.data, "extra", path), link)
                pairs[path] |= self.pieces.extra(plan, leaves[path], key)
        return pairs

    def params(self, state: PairState) -> PyTree:
        plans, pairs = self.plans(state.base), state.pairs
        leaves, treedef = paths.flatten(state.base)

        def effective(path: str, weight: Array) -> Array:
            plan = plans[path]
            if plan.mode == "frozen":
                return weight
            wide = weight.astype(plan.wide_dtype)
            if plan.mode == "dense":
                exact = wide + state.dense[path]
            elif self.pieces.weight is not None:
                exact = self.pieces.weight(plan, wide, pairs[path])
            else:
                drawn, factor = self.beside(plan, pairs[path])
                exact = wide + lift_leaf(factor, drawn, plan)
            return exact.astype(weight.dtype)

        return paths.unflatten(treedef, {p: effective(p, w) for p, w in leaves.items()})

    def beside(self, plan: LeafPlan, pair: Pair) -> tuple[Array, Array]:
        """The two factors of the change."""
        if self.pieces.beside is not None:
            return self.pieces.beside(plan, pair)
        return pair["drawn"], pair["zero"]

    def next_link(self, state: PairState) -> PairState:
        # Dense changes go on beside the base with their moments: only pairs are merged.
        still = state._replace(dense=jax.tree.map(jnp.zeros_like, state.dense))
        base = self.params(still)
        pairs = self.begin(base, state.count // self.spec.resample_every)
        state = state._replace(base=base).holding(by_name(pairs))
        if not self.pieces.restart:
            return state
        fresh = self.begin_rules(self.plans(base), state)
        return state._replace(inner={**fresh, "dense": state.inner["dense"]})

    def step(
        self, state: PairState, loss_fn: LossFn, *args: Any
    ) -> tuple[PairState, Array]:
        if self.pieces.chain:
            ends = (state.count > 0) & (state.count % self.spec.resample_every == 0)
            state = lax.cond(ends, self.next_link, lambda state: state, state)
        plans, trained = self.plans(state.base), self.groups(state)
        value, grads = self.differentiated(trained, plans, state, loss_fn, args)
        grads = self.mapped(plans, grads, state)
        live, chosen = self.live(grads, state)
        grads = where(live, grads, jax.tree.map(jnp.zeros_like, grads))
        directions, inner = self.directions(plans, grads, state)
        rate = rate_at(self.learning_rate, state.count)
        moved = jax.tree.map(lambda u: -rate * u, directions)
        after = self.settled(plans, state.holding(optax.apply_updates(trained, moved)))
        # A gradient of zero does not keep a leaf at rest: Adam's moments still move it.
        after = where(live, after, trained)
        count = optax.safe_increment(state.count)
        state = state._replace(inner=inner, subset=chosen, count=count)
        return state.holding(after), value

    def groups(self, state: PairState) -> Groups:
        """What is trained."""
        drawn = {"drawn": state.drawn} if self.pieces.train_drawn else {}
        return {"zero": state.zero, **drawn, "dense": state.dense, **state.extra}

    def differentiated(
        self,
        trained: Groups,
        plans: dict[str, LeafPlan],
        state: PairState,
        loss_fn: LossFn,
        args: tuple[Any, ...],
    ) -> tuple[Array, Groups]:
        """The loss and its gradients, zero for what the step does not train."""
        cases = self.pieces.cases
        if cases is None:
            return jax.value_and_grad(self.loss)(trained, plans, state, loss_fn, args)

        def branch(live: set[str]) -> tuple[Array, Groups]:
            own = only(trained, live)

            def loss(own: Groups) -> Array:
                held = {group: trained[group] | own[group] for group in trained}
                return self.loss(held, plans, state, loss_fn, args)

            value, grads = jax.value_and_grad(loss)(own)
            zeros = jax.tree.map(jnp.zeros_like, trained)
            return value, {group: zeros[group] | grads[group] for group in trained}

        every = cases.live(paths_of(trained))
        index = cases.choose(state.count, len(every))
        return lax.switch(index, [lambda live=live: branch(live) for live in every])

    def loss(
        self,
        trained: Groups,
        plans: dict[str, LeafPlan],
        state: PairState,
        loss_fn: LossFn,
        args: tuple[Any, ...],
    ) -> Array:
        """The loss of what is trained; the change stays beside the weight if it can."""
        now = state.holding(trained)
        # Such a rule (DoRA's norm) needs the changed weight whole, so it is formed.
        if self.pieces.weight is not None:
            return loss_fn(self.params(now), *args)
        seen = {path: self.beside(plans[path], pair) for path, pair in now.pairs.items()}
        drawn = {path: pair[0] for path, pair in seen.items()}
        factors = {path: pair[1] for path, pair in seen.items()}
        return unmerged(loss_fn, plans, factors | now.dense, drawn)(now.base, *args)

    def mapped(
        self, plans: dict[str, LeafPlan], grads: Groups, state: PairState
    ) -> Groups:
        """The gradients as the method wants them."""
        if self.pieces.gradient is None:
            return grads
        own = of_pairs(grads)
        for path, pair in state.pairs.items():
            own[path] = self.pieces.gradient(plans[path], own[path], pair)
        return grads | by_name(own)

    def live(
        self, grads: Groups, state: PairState
    ) -> tuple[dict[str, Array] | None, PyTree]:
        """Which leaves are trained, ``None`` for all, and what decides next time."""
        if self.pieces.cases is not None:
            known = paths_of(grads)
            every = self.pieces.cases.live(known)
            flags = jnp.asarray([[path in live for path in known] for live in every])
            own = flags[self.pieces.cases.choose(state.count, len(every))]
            return {path: own[i] for i, path in enumerate(known)}, state.subset
        if self.pieces.subset is None:
            return None, state.subset
        # JAX sorts the keys of a dict it has handled, and leaves are told apart by place.
        pairs = dict(sorted(state.pairs.items()))
        flags, chosen = self.pieces.subset.update(
            state.subset, state.count, of_pairs(grads), pairs
        )
        return {path: flags[index] for index, path in enumerate(pairs)}, chosen

    def settled(self, plans: dict[str, LeafPlan], state: PairState) -> Groups:
        """What is trained, as the method leaves it after a step."""
        if self.pieces.settle is None:
            return self.groups(state)
        pairs = state.pairs
        settled = {p: self.pieces.settle(plans[p], pair) for p, pair in pairs.items()}
        return self.groups(state.holding(by_name(settled)))

    def rule(self, group: str) -> optax.GradientTransformationExtraArgs:
        inner = ADAM if self.pieces.inner is None else self.pieces.inner
        return as_rule(self.pieces.rules.get(group, inner))

    def alone(self, state: PairState) -> Groups:
        """The groups whose rule sees them alone."""
        joint = () if self.pieces.joint is None else ("zero", "drawn")
        return {g: held for g, held in self.groups(state).items() if g not in joint}

    def begin_rules(self, plans: dict[str, LeafPlan], state: PairState) -> dict[str, Any]:
        """Inner states at their start."""
        with knowing(plans):
            inner = {g: self.rule(g).init(held) for g, held in self.alone(state).items()}
        if self.pieces.joint is None:
            return inner
        init = self.pieces.joint.init
        return inner | {"pair": {p: init(plans[p], w) for p, w in state.pairs.items()}}

    def directions(
        self, plans: dict[str, LeafPlan], grads: Groups, state: PairState
    ) -> tuple[Groups, dict[str, Any]]:
        """What the learning rate multiplies, and the inner states after it."""
        moved: Groups = {}
        inner = {}
        for group, held in self.alone(state).items():
            with knowing(plans):
                moved[group], inner[group] = self.rule(group).update(
                    grads[group], state.inner[group], held, plans=plans
                )
        if self.pieces.joint is None:
            return moved, inner
        own, after = {}, {}
        joint, gradients = state.inner["pair"], of_pairs(grads)
        for path, pair in state.pairs.items():
            own[path], after[path] = self.pieces.joint.update(
                plans[path], gradients[path], joint[path], pair
            )
        return moved | by_name(own), inner | {"pair": after}

    def trained(self, params: PyTree) -> int:
        groups = self.groups(jax.eval_shape(self.init, params))
        if self.pieces.cases is not None:
            every = self.pieces.cases.live(paths_of(groups))
            return max(size(only(groups, live)) for live in every)
        sizes = sorted(map(size, of_pairs(groups).values()), reverse=True)
        if self.pieces.subset is not None:
            # A run alone knows which leaves are live: the largest, so never too few.
            sizes = sizes[: self.pieces.subset.size(len(sizes))]
        return size(groups["dense"]) + sum(sizes)

    def optimizer_bytes(self, params: PyTree) -> int:
        return nbytes(jax.eval_shape(self.init, params).inner)
