"""GRPO on Tunix's learner: factor form and followers beside its own full and qwix LoRA.

stories260K, tuned for a short while on sums told as stories, then 8 problems with 8
answers each a step, reward 1 for the right number; no penalty on leaving the start, and
what else GRPO has is Tunix's default. The rate of every method, constant after 5 steps
of warm-up, is searched on one grid of powers of three on a seed of its own, until the
best has a worse neighbour on both sides. A seed decides problems, samples and sketches.

A run is judged on 384 other problems, one sample each at the temperature of the rollout,
every 5 steps. Time is that of the processor on one core, judging left out: steps times
the median step, of rollout, update and sync together, by short runs of all methods in
turn.

    python -m benchmarks.pretrained.grpo --data-dir DIR [--quick]
"""

from __future__ import annotations

import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from finetuning import decoder
from flax import nnx
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, Mode, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

import raclora_jax as rl
from benchmarks.pretrained import arithmetic, run
from benchmarks.pretrained.arithmetic import ANSWER, PROMPT, Start
from benchmarks.shared import rows as result_rows
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax.tunix import FollowerRollout, RacLoraRLCluster

SEEDS, TUNING_SEED = (0, 1, 2), 9
STEPS, JUDGED = 40, 5
ROWS, GENERATIONS = 8, 8
HELD_OUT = 384
WARM_UP = 5
FACTOR = 3.0  # between rates
RACED, ROUNDS = 14, 3
LAST = 3  # judgements that a run is scored by
MATRICES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
KEPT = result_rows.ROOT / "out" / "grpo_start.safetensors"


class Entry(NamedTuple):
    """One contender.

    Attributes:
      name: What the table calls it.
      cluster: ``cluster(start, config, schedule, seed)``, Tunix's or ours; ``config``
        makes a ``ClusterConfig`` of an optimizer and a rollout engine.
      guess: Where the search of the rate begins.
    """

    name: str
    cluster: Callable[..., RLCluster]
    guess: float


def full(start: Start, config: Any, rate: optax.Schedule, seed: int) -> RLCluster:
    """Every parameter, as Tunix trains a plain model."""
    del seed
    return RLCluster(
        actor=_net(start),
        tokenizer=start.tokens,
        cluster_config=config(optax.adamw(rate, weight_decay=0.0), "vanilla"),
    )


def lora(start: Start, config: Any, rate: optax.Schedule, seed: int) -> RLCluster:
    """qwix's pairs of rank 8 on every matrix of the layers."""
    net, ids = _net(start), jnp.ones((1, 4), jnp.int32)
    provider = qwix.LoraProvider(module_path=MATRICES, rank=8, alpha=8.0)
    mask = jnp.tril(jnp.ones((1, 4, 4), bool))
    rngs = nnx.Rngs(seed)
    places = jnp.arange(4)[None]
    adapted = qwix.apply_lora_to_model(net, provider, ids, places, None, mask, rngs=rngs)
    return RLCluster(
        actor=adapted,
        tokenizer=start.tokens,
        cluster_config=config(optax.adamw(rate, weight_decay=0.0), "vanilla"),
    )


def ours(
    rank: int, link: int, *, stateless: bool, **options: Any
) -> Callable[..., RLCluster]:
    """The matrices of the layers through sketches, the sampler a follower."""

    def cluster(start: Start, config: Any, rate: optax.Schedule, seed: int) -> RLCluster:
        params = start.model.params
        spec = decoder.spec_for(params, rank, resample_every=link, alpha="dim", **options)
        inner = rl.orthogonal() if stateless else optax.scale_by_adam()
        tx = rl.raclora(rate, spec, inner=inner, key=seed)
        return RacLoraRLCluster(
            actor=_net(start),
            tokenizer=start.tokens,
            cluster_config=config(tx, FollowerRollout),
            spec=spec,
            fused=stateless,
        )

    return cluster


def _net(start: Start) -> nnx.Module:
    return start.model.restore(jax.tree.map(jnp.copy, start.model.params))


_BLOCKS = {"sketch": "block", "stateless": True}
ENTRIES = (
    Entry("full AdamW", full, 3e-4),
    Entry("qwix LoRA r8 AdamW", lora, 1e-3),
    Entry("RAC r32 block orthogonal, link 1", ours(32, 1, **_BLOCKS), 1e-3),
    Entry("RAC r12 Adam, link 50", ours(12, 50, stateless=False), 1e-3),
)


# One run -----------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run was.

    Attributes:
      rewards: On the held-out problems, after 0, ``JUDGED``, ... steps.
      seconds: The median step, of the processor.
      sync_bytes: What goes from trainer to sampler in one sync.
    """

    rewards: list[float]
    seconds: float
    sync_bytes: int


def trained(entry: Entry, start: Start, rate: float, seed: int, steps: int) -> Run:
    """One run of a method."""
    sampling = RolloutConfig(
        max_tokens_to_generate=ANSWER,
        max_prompt_length=PROMPT,
        kv_cache_size=64,
        temperature=1.0,
    )

    def config(tx: optax.GradientTransformation, engine: Any) -> ClusterConfig:
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
        return ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
            rollout_engine=engine,
            training_config=RLTrainingConfig(
                actor_optimizer=tx, eval_every_n_steps=10**9, max_steps=steps
            ),
            rollout_config={Mode.TRAIN: sampling, Mode.EVAL: sampling},
        )

    warm = optax.linear_schedule(rate / WARM_UP, rate, WARM_UP)
    cluster = entry.cluster(start, config, warm, seed)
    held = arithmetic.problems(100 + seed, HELD_OUT)
    rewards: list[float] = []
    spent: list[float] = []

    def judge() -> None:
        sampling.seed = 10**6
        said = cluster.generate([one.prompt for one in held], mode=Mode.EVAL).text
        rewards.append(
            statistics.mean(arithmetic.reward(None, said, [one.answer for one in held]))
        )

    def batches() -> Iterator[dict[str, Any]]:
        draw = np.random.default_rng(seed)
        begun = time.process_time()
        for step in range(steps):
            if step:
                spent.append(time.process_time() - begun)
            if step % JUDGED == 0:
                judge()
            begun = time.process_time()
            # Tunix samples every step by the seed of its config: one for each.
            sampling.seed = seed * steps + step
            told = [arithmetic.problem(draw) for _ in range(ROWS)]
            yield {
                "prompts": np.array([one.prompt for one in told]),
                "answer": np.array([one.answer for one in told]),
            }

    sync = _sync_bytes(cluster)
    learner = GRPOLearner(
        cluster, GRPOConfig(num_generations=GENERATIONS, beta=0.0), arithmetic.reward
    )
    learner.train(batches())
    judge()
    return Run(rewards, statistics.median(spent[2:]), sync())


def _sync_bytes(cluster: RLCluster) -> Callable[[], int]:
    """How many bytes the last sync took: a message, or what Tunix hands over."""
    if not isinstance(cluster.rollout, FollowerRollout):
        model = cluster.actor_trainer.model
        pairs = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
        sent = pairs or jax.tree.leaves(nnx.state(model, nnx.Param))
        return lambda: sum(leaf.nbytes for leaf in sent)
    sizes = []
    take = cluster.rollout.follow

    def counted(message: bytes) -> None:
        sizes.append(len(message))
        take(message)

    cluster.rollout.follow = counted  # type: ignore[method-assign]
    return lambda: sizes[-1]


# The study ---------------------------------------------------------------------------


def fill(
    results: Results,
    start: Start,
    entries: list[Entry],
    seeds: tuple[int, ...],
    steps: int,
) -> None:
    """The runs that are missing, each saved as it ends."""
    for entry in entries:

        def row_of(rate: float, seed: int, entry: Entry = entry) -> dict[str, Any]:
            study = f"rate {rate:.3g}, seed {seed}"
            row = results.get(study, entry.name)
            if row is None:
                found = trained(entry, start, rate, seed, steps)
                reward = statistics.mean(found.rewards[-LAST:])
                own = {"study": study, "method": entry.name, "rate": rate, "seed": seed}
                row = own | {"steps": steps, "reward": reward} | found._asdict()
                results.add(row)
                print(f"{entry.name:36} {study:22} {reward:.3f}", flush=True)
            return row

        tried = run.search(
            lambda rate, row_of=row_of: -row_of(rate, TUNING_SEED)["reward"],
            entry.guess,
            FACTOR,
        )
        best = min(tried, key=lambda rate, tried=tried: tried[rate])
        for seed in seeds:
            row_of(best, seed)


def race(results: Results, start: Start, rounds: int) -> None:
    """The median step of every method, by short runs in turn."""
    spent: dict[str, list[float]] = {entry.name: [] for entry in ENTRIES}
    for turn in range(rounds):
        for entry in ENTRIES:
            found = trained(entry, start, entry.guess, turn, RACED)
            spent[entry.name].append(found.seconds)
    for name, seconds in spent.items():
        own = {"study": "time", "method": name, "rounds": seconds}
        results.add(own | {"seconds": statistics.median(seconds)})


def main() -> None:
    """Runs what is missing and prints it."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    options = timing.parse(parser, __file__)
    use_one_core()
    # Runs of one method share all programs but the step, which holds the rate.
    jax.config.update("jax_compilation_cache_dir", str(KEPT.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    results = Results(
        None if options.out is None else options.out / "grpo.json",
        "pretrained.grpo",
        prompts=ROWS,
        generations=GENERATIONS,
        judged_every=JUDGED,
        judged_on=HELD_OUT,
        tuning_seed=TUNING_SEED,
        last=LAST,
    )
    entries = [entry for entry in ENTRIES if re.search(options.only, entry.name)]
    start = arithmetic.start(options.data_dir, KEPT)
    if options.quick:
        fill(results, start, entries[:1], SEEDS[:1], JUDGED)
    else:
        fill(results, start, entries, SEEDS, STEPS)
        if results.get("time", ENTRIES[0].name) is None and not options.only:
            race(results, start, ROUNDS)


if __name__ == "__main__":
    main()
