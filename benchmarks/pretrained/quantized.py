"""The small Llama fine-tuned on a base of codes, its rounding error carried or let go.

stories260K on tiny Shakespeare as in ``benchmarks.pretrained.language``: the adapter
form of RAC-LoRA of rank 16 with the orthogonal rule, 300 steps, links of 25 and of 5
steps. The seven matrices of each layer are in float32, in int8 or in nf4 (one scale a
column). At a merge the error is carried (``raclora_jax.quantized``), or the sum is
quantised anew and the error let go. Beside them LoRA on the nf4 base, which is never
merged. Rates are tuned on one grid of powers of two, on seed 0; three seeds.

    python -m benchmarks.pretrained.quantized --data-dir DIR [--quick]
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import optax
import qwix
from jax import Array, lax

import raclora_jax as rl
from benchmarks.pretrained import language, run
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods, quantized
from raclora_jax.methods._method import Method

RANK = 16
LINKS = (25, 5)
BASES = ("float32", "int8", "nf4")
LORA_RANK = 8


class State(NamedTuple):
    """A chain on a frozen base."""

    base: Any
    error: Any
    factors: Any
    chain: Any
    opt_state: Any
    count: Array


class Contender(NamedTuple):
    """A base, and what becomes of the error of a merge.

    Attributes:
      base: One of ``BASES``.
      link: Steps a link; 0 for LoRA, which is not merged.
      carries: Whether the error is carried.
    """

    base: str
    link: int
    carries: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        if not self.link:
            return f"LoRA r{LORA_RANK} Adam on {self.base}, never merged"
        kept = ", error carried" if self.carries else ", error let go"
        return f"{self.base}{kept * (self.base != 'float32')}, link {self.link}"

    @property
    def spec(self) -> rl.Spec:
        """Of the chain; of LoRA it says which leaves are quantised."""
        every = self.link or LINKS[0]
        options = {"resample_every": every, "alpha": "dim", "rest": "frozen"}
        return rl.Spec(RANK, side="smaller", **options)

    def entry(self) -> Entry:
        """For a ``contest``."""
        make = self._chain if self.link else self._lora
        return Entry(self.name, make, 0.002 if self.link else 0.008, link=self.link)

    def codes(self, params: Any) -> tuple[Any, Any]:
        """The base and what its codes do not hold; of float32 nothing."""
        if self.base == "float32":
            return params, quantized.zero_error(params, self.spec)
        return quantized.quantize(params, self.spec, self.base)

    def merged(self, state: State) -> tuple[Any, ...]:
        """``(base, error, factors, chain)`` of the next link."""
        held = (state.base, state.error, state.factors, state.chain)
        if self.carries:
            return quantized.next_link(*held, self.spec)
        base, error, factors, chain = held
        total = rl.effective_params(
            base, factors, chain, self.spec, dequantize=qwix.dequantize
        )
        _, _, *following = quantized.next_link(*held, self.spec)
        return self.codes(total)[0], error, *following

    def _chain(self, schedule: optax.Schedule, key: Array) -> Method:
        spec = self.spec
        rule = optax.chain(rl.orthogonal(), optax.scale_by_learning_rate(schedule))

        def init(params: Any) -> State:
            base, error = self.codes(params)
            factors, chain = rl.init_adapter(base, spec, key=key)
            opt_state = rl.with_plans(rule, base, spec).init(factors)
            return State(base, error, factors, chain, opt_state, jax.numpy.int32(0))

        def step(state: State, loss_fn: Any, *args: Any) -> tuple[State, Array]:
            def of_next(state: State) -> State:
                return State(*self.merged(state), state.opt_state, state.count)

            ends = (state.count > 0) & (state.count % self.link == 0)
            state = lax.cond(ends, of_next, lambda state: state, state)
            adapted = rl.adapted(loss_fn, spec, dequantize=qwix.dequantize)
            loss, grads = jax.value_and_grad(adapted)(
                state.factors, state.base, state.chain, *args
            )
            tx = rl.with_plans(rule, state.base, spec)
            updates, opt_state = tx.update(grads, state.opt_state, state.factors)
            factors = optax.apply_updates(state.factors, updates)
            state = state._replace(factors=factors, opt_state=opt_state)
            return state._replace(count=state.count + 1), loss

        def size(params: Any) -> int:
            return sum(row.trained for row in rl.summary(params, spec).rows)

        return Method(init, step, self.params, size, lambda params: 4)

    def _lora(self, schedule: optax.Schedule, key: Array) -> Method:
        """Beside weights that are read from their codes once: they never change."""
        spec = rl.Spec(LORA_RANK, side="smaller", rest="frozen")
        made = methods.lora(schedule, spec, key=key)
        return made._replace(init=lambda params: made.init(self.read(params)))

    def read(self, params: Any) -> Any:
        """Weights as their codes say them."""
        return dequantized(self.codes(params)[0])

    def params(self, state: State) -> Any:
        """After a last merge, as the codes say them."""
        return dequantized(self.merged(state)[0])

    def exact(self, state: State) -> Any:
        """After a last merge, with the error that is carried."""
        return quantized.exact_params(*self.merged(state)[:2])


def dequantized(base: Any) -> Any:
    """Every leaf as an array."""
    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf,
        base,
        is_leaf=lambda leaf: isinstance(leaf, qwix.QArray),
    )


def contenders() -> list[Contender]:
    """The rows of the table."""
    found = [Contender("nf4", 0, False)]
    for link in LINKS:
        found.append(Contender("float32", link, True))
        for base in BASES[1:]:
            found += [Contender(base, link, True), Contender(base, link, False)]
    return found


class Runner(run.Runner):
    """That of the contest, which also judges with the carried error at the end."""

    def __init__(self, task: run.Task, contender: Contender):
        super().__init__(task, contender.entry())
        self.contender = contender
        self.exact: dict[tuple[float, int], float] = {}

    def run(self, rate: float, steps: int, seed: int) -> float:
        """The validation loss at the end of a run, in the codes."""
        state = self.start(seed)
        for tokens in self.task.batches(seed, steps, self.entry.batch):
            state, _ = self.advance(state, rate, steps, seed, tokens)
        if not self.contender.link:
            made = self.entry.make(lambda count: 0.0 * count, jax.random.key(seed))
            return self.task.validation_loss(made.params(state))
        if self.contender.carries:
            exact = jax.jit(self.contender.exact)(state)
            self.exact[rate, seed] = self.task.validation_loss(exact)
        return self.task.validation_loss(jax.jit(self.contender.params)(state))

    def bytes(self) -> dict[str, int]:
        """What the run holds, by its buffers, and the codes as packed ones would be."""
        params = self.task.params
        base, error = self.contender.codes(params)
        if not (self.contender.link and self.contender.carries):
            error = {}
        factors = {}
        if self.contender.link:
            factors, _ = rl.init_adapter(base, self.contender.spec, key=0)
        held = quantized.held(base, error, factors)._asdict()
        spared = sum(
            leaf.qvalue.on_device_size_in_bytes() - math.ceil(leaf.qvalue.size / 2)
            for leaf in jax.tree.leaves(base, is_leaf=lambda x: hasattr(x, "qvalue"))
            if getattr(leaf, "qtype", None) == "nf4"
        )
        named = {f"{name}_bytes": size for name, size in held.items()}
        return named | {"base_bytes_packed": held["base"] - spared}


def _work(data_dir: pathlib.Path, contender: Contender, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    runner = Runner(run.Task(data_dir), contender)
    row = run.contest(runner, guess=runner.entry.guess, **job)
    exact = [runner.exact.get((row["rate"], seed)) for seed in row["seeds"]]
    kept = {"loss_exact": exact} if None not in exact else {}
    return row | kept | runner.bytes() | contender._asdict()


def main() -> None:
    """Runs what is missing and prints the rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    use_one_core()
    out = None if options.out is None else options.out / "quantized.json"
    results = Results(
        out,
        "pretrained.quantized",
        tokens_a_step="8 x 64",
        validation_windows=run.WINDOWS,
    )
    seeds = language.SEEDS[:1] if options.quick else language.SEEDS
    steps = run.CHUNK if options.quick else language.SHORT
    jobs = [
        {"contender": one, "study": "quantized", "steps": steps, "seeds": seeds}
        for one in contenders()
        if not results.get("quantized", one.name)
    ]
    work = functools.partial(_work, options.data_dir)
    results.fill(work, jobs[:3] if options.quick else jobs, options.workers)


if __name__ == "__main__":
    main()
