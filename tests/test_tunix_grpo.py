"""GRPO on Tunix's learner: an actor in factor form, and rollouts that follow it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_same_bits, refuses

import raclora_jax as rl
from raclora_jax import flax as rl_flax

pytest.importorskip("tunix")

import orbax.checkpoint as ocp
from tunix.models.llama3 import model as llama
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from raclora_jax.tunix import FollowerRollout, RacLoraRLCluster

KEY, RANK = 7, 4
CONFIG = llama.ModelConfig(
    num_layers=1,
    vocab_size=32,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)
RULES = [
    rl.Rule(".*o_proj/w", rows=(0, 1)),
    rl.Rule(".*(proj/w|kernel)", rows=(0,)),
    rl.Rule(".*", mode="frozen"),
]
BLOCKS = rl.Spec(RANK, sketch="block", alpha="dim", resample_every=1, rules=RULES)
DENSE = rl.Spec(RANK, resample_every=3, rules=[*RULES[:2], rl.Rule(".*", mode="dense")])


class Letters:
    """A tokenizer of one letter each."""

    def encode(self, text):
        return [3 + ord(letter) % 26 for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + one - 3) for one in ids if one > 2)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def model():
    """With weights in the feed-forward layer too, which Tunix makes as zeros."""
    net, draw = llama.Llama3(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for part in ("gate_proj", "up_proj", "down_proj"):
        kernel = getattr(net.layers[0].mlp, part).kernel
        kernel[...] = jnp.asarray(0.2 * draw.normal(size=kernel.shape), jnp.float32)
    return net


def stateless(spec=BLOCKS):
    return rl.raclora(1e-2, spec, inner=rl.orthogonal(), key=KEY)


def adam(spec=DENSE):
    # A large epsilon: Adam's quotient of two small numbers would blow rounding up.
    return rl.raclora(1e-2, spec, inner=optax.scale_by_adam(eps=1e-3), key=KEY)


def config(tx, engine=FollowerRollout, rollout_devices=slice(0, 1), **options):
    training = {"eval_every_n_steps": 1000, "max_steps": 4} | options
    roles = {Role.ACTOR: slice(0, 1), Role.REFERENCE: slice(0, 1)}
    roles[Role.ROLLOUT] = rollout_devices
    auto = (jax.sharding.AxisType.Auto,) * 2

    def mesh(devices):
        found = jax.devices()[devices]
        return jax.make_mesh((len(found), 1), ("fsdp", "tp"), auto, devices=found)

    return ClusterConfig(
        role_to_mesh={role: mesh(devices) for role, devices in roles.items()},
        rollout_engine=engine,
        training_config=RLTrainingConfig(actor_optimizer=tx, **training),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=4,
            max_prompt_length=4,
            kv_cache_size=8,
            temperature=1.0,
            seed=3,
        ),
    )


def made(kind, cluster_config, **options):
    return kind(
        actor=model(),
        reference=model(),
        tokenizer=Letters(),
        cluster_config=cluster_config,
        **options,
    )


def ours(tx, spec, fused=False, engine=FollowerRollout, log=None, **options):
    own = {"spec": spec, "fused": fused, "log": log}
    return made(RacLoraRLCluster, config(tx, engine, **options), **own)


def vowels(prompts, completions, **_):
    return [float(sum(letter in "aeiou" for letter in said)) for said in completions]


def prompts(count):
    draw = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "prompts": np.array(["".join(draw.choice([*"abcdef"], 3)) for _ in "four"])
        }


def train(cluster, steps=4):
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=4), vowels)
    learner.train(prompts(steps))
    return cluster


def actor_weights(cluster):
    return jax.device_get(rl_flax.to_tree(cluster.actor_trainer.model)[0])


def rollout_weights(cluster):
    return jax.device_get(rl_flax.to_tree(cluster.rollout.model())[0])


@pytest.fixture(scope="module")
def base():
    return rl_flax.to_tree(model())[0]


@pytest.fixture
def log(tmp_path):
    return rl.follow.Log(tmp_path / "messages")


def test_a_step_is_that_of_the_drop_in_form(base):
    """On Tunix's own cluster, whose gradients are dense: same prompts and samples."""
    drop_in = train(made(RLCluster, config(adam(), "vanilla")), 2)
    factor = train(ours(adam(), DENSE, engine="vanilla"), 2)
    assert_close(actor_weights(factor), actor_weights(drop_in))
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), actor_weights(factor), base)
    assert min(jax.tree.leaves(moved)) > 1e-4  # well above what the forms differ by


class Watched(FollowerRollout):
    """A follower that notes its weights whenever it samples."""

    seen: list = []  # noqa: RUF012

    def generate(self, *args, **kwargs):
        self.seen.append(jax.device_get(rl_flax.to_tree(self.model())[0]))
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize(
    ("tx", "spec", "fused"),
    [(stateless(), BLOCKS, True), (adam(), DENSE, False)],
    ids=["fused", "in parts"],
)
def test_rollouts_sample_from_the_weights_of_the_actor(base, log, tx, spec, fused):
    Watched.seen = []
    cluster = train(ours(tx, spec, fused, engine=Watched, log=log))
    assert_same_bits(rollout_weights(cluster), actor_weights(cluster))
    # By messages: who has only the base and these has been at the same weights.
    assert log.steps() == [*range(4)]
    assert len(Watched.seen) == 4
    params, position = base, rl.follow.start(base, key=KEY)
    for step, seen in enumerate(Watched.seen):
        assert_same_bits(seen, jax.device_get(params))
        params, position = rl.follow.apply(params, log.read(step), position)
    assert_same_bits(actor_weights(cluster), jax.device_get(params))
    moved = np.abs(params["layers"]["0"]["attn"]["q_proj"]["w"])
    assert np.any(moved != np.abs(base["layers"]["0"]["attn"]["q_proj"]["w"]))


@pytest.mark.slow
def test_a_rollout_on_another_mesh_follows():
    apart = ours(stateless(), BLOCKS, True, rollout_devices=slice(4, 6))
    train(apart, 2)
    kernel = apart.rollout.model().layers[0].mlp.gate_proj.kernel[...]
    assert kernel.sharding.device_set == {*jax.devices()[4:6]}
    assert_same_bits(rollout_weights(apart), actor_weights(apart))


def test_a_run_that_was_stopped_goes_on_at_the_same_bits(tmp_path, log):
    whole = train(ours(stateless(), BLOCKS, True))
    options = {
        "checkpoint_root_directory": str(tmp_path / "run"),
        "checkpointing_options": ocp.CheckpointManagerOptions(save_interval_steps=1),
    }
    train(ours(stateless(), BLOCKS, True, log=log, **options), 2)
    refuses(
        lambda: ours(stateless(), BLOCKS, True, **options),
        "checkpoint is of step 2", "expected log=Log(...)",
    )  # fmt: skip
    again = train(ours(stateless(), BLOCKS, True, log=log, **options), 4)
    assert log.steps() == [*range(4)]
    assert_same_bits(actor_weights(again), actor_weights(whole))
    assert_same_bits(rollout_weights(again), actor_weights(whole))


@pytest.mark.slow
def test_micro_batches_are_accumulated_by_the_inner_rule(log):
    sizes = {"mini_batch_size": 4, "train_micro_batch_size": 2}
    refuses(
        lambda: ours(adam(), DENSE, **sizes),
        "gradient_accumulation_steps=2", "MultiSteps",
    )  # fmt: skip
    inner = optax.MultiSteps(optax.scale_by_adam(eps=1e-3), 2)
    tx = rl.raclora(1e-2, DENSE, inner=inner, key=KEY)
    cluster = train(ours(tx, DENSE, log=log, **sizes), 2)
    assert (cluster.actor_trainer.train_steps, len(log.steps())) == (2, 4)
    assert_same_bits(rollout_weights(cluster), actor_weights(cluster))


def products(cluster):
    """Shapes of all matrix products of a compiled step on 16 completions."""
    trainer = cluster.actor_trainer
    GRPOLearner(cluster, GRPOConfig(num_generations=4, beta=0.0), vowels)
    from tunix.rl.common import TrainExample

    ids = jnp.ones((16, 4), jnp.int32)
    example = TrainExample(
        prompt_ids=ids,
        prompt_mask=ids > 0,
        completion_ids=ids,
        completion_mask=ids > 0,
        advantages=jnp.ones(16),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    graph, state = nnx.split((trainer.model, trainer.optimizer))

    def step(state):
        return trainer.create_train_step_fn()(*nnx.merge(graph, state), example)[0]

    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                shapes.add(tuple(sorted(eqn.outvars[0].aval.shape)))
            for inner in jax.core.jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(step)(state).jaxpr)
    return shapes


def test_no_gradient_of_an_adapted_weight_is_formed():
    kernel = (CONFIG.embed_dim, CONFIG.hidden_dim)
    drop_in = made(RLCluster, config(stateless(), "vanilla"))
    assert kernel in products(drop_in)
    for fused in (True, False):
        found = products(ours(stateless(), BLOCKS, fused))
        assert kernel not in found
        assert any(RANK in shape for shape in found)


def test_what_does_not_go_is_refused():
    import qwix

    provider = qwix.LoraProvider(module_path=".*proj", rank=2, alpha=2.0)
    ids, mask = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4, 4), bool)
    adapted = qwix.apply_lora_to_model(model(), provider, ids, ids, None, mask)
    refuses(
        lambda: RacLoraRLCluster(
            actor=adapted,
            tokenizer=Letters(),
            cluster_config=config(stateless()),
            spec=BLOCKS,
        ),
        "has LoRA modules",
    )
    offloads = dataclasses.replace(config(stateless()), offload_to_cpu=True)
    refuses(
        lambda: made(RacLoraRLCluster, offloads, spec=BLOCKS),
        "offload_to_cpu=True", "expected False",
    )  # fmt: skip
    refuses(
        lambda: ours(stateless(), BLOCKS, engine="vanilla", log=object()),
        "a rollout_engine that follows", "FollowerRollout", "'vanilla'",
    )  # fmt: skip
    refuses(
        lambda: train(ours(adam(), DENSE, fused=True), 1),
        "expected a law that picks rows", "sketch='block'",
    )  # fmt: skip


def test_a_follower_is_not_fed_weights():
    """Nor moved before it is told where it is."""
    cluster = made(RLCluster, config(optax.sgd(1.0)))
    refuses(lambda: cluster.rollout.follow(b""), "expected begin(params, position)")
    refuses(lambda: train(cluster, 1), "moves by messages alone", "RacLoraRLCluster")
