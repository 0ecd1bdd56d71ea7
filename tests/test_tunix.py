"""Tunix's trainers in factor form: the run of the drop-in form, its checkpoints too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close

import raclora_jax as rl
from raclora_jax import flax as rl_flax

pytest.importorskip("tunix")

import orbax.checkpoint as ocp
from tunix.models.llama3 import model as llama
from tunix.sft import utils
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainExample
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from raclora_jax.tunix import RacLoraDPOTrainer, RacLoraTrainer

CONFIG = llama.ModelConfig(
    num_layers=2,
    vocab_size=67,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)
STEPS = 50


def model(config=CONFIG):
    """With weights in the feed-forward layers too, which Tunix makes as zeros."""
    net, draw = llama.Llama3(config, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for layer in net.layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            kernel = getattr(layer.mlp, part).kernel
            kernel[...] = jnp.asarray(0.2 * draw.normal(size=kernel.shape), jnp.float32)
    return net


def inputs(example):
    tokens, mask = example.input_tokens, example.input_mask
    return {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def examples(count, rows=8):
    draw = np.random.default_rng(0)
    for _ in range(count):
        tokens = draw.integers(1, 67, size=(rows, 9)).astype(np.int32)
        yield TrainingInput(tokens, np.ones((rows, 9), bool))


@pytest.fixture(scope="module")
def spec():
    tree, restore = rl_flax.to_tree(model())
    batch = inputs(next(examples(1)))

    def logits(tree):
        return restore(tree)(
            batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
        )[0]

    return rl.trace_spec(logits, tree, rank=4, resample_every=10)


def rule(spec, inner=None):
    # A large epsilon: Adam's quotient of two small numbers would blow rounding up.
    inner = inner or optax.scale_by_adam(eps=3e-4)
    return rl.raclora(3e-3, spec, inner=inner, weight_decay=0.01, key=7)


def weights(net):
    return jax.device_get(rl_flax.to_tree(net)[0])


def train(make, net, count=STEPS, **options):
    config = TrainingConfig(eval_every_n_steps=1000, **{"max_steps": count} | options)
    trainer = make(net, config).with_gen_model_input_fn(inputs)
    each = options.get("gradient_accumulation_steps") or 1
    trainer.train(examples(count * each))
    return trainer


def both(spec):
    factor = lambda net, config: RacLoraTrainer(net, rule(spec), config, spec=spec)  # noqa: E731
    dropin = lambda net, config: PeftTrainer(net, rule(spec), config)  # noqa: E731
    return factor, dropin


def test_factor_form_is_the_drop_in_form(spec):
    factor, dropin = both(spec)
    ours, theirs, start = model(), model(), weights(model())
    trainer = train(factor, ours)
    train(dropin, theirs)
    assert isinstance(trainer.optimizer, rl_flax.Optimizer)
    assert_close(weights(ours), weights(theirs))
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), weights(ours), start)
    assert min(jax.tree.leaves(moved)) > 4e-5  # well above what the forms differ by


def test_a_fused_step_is_the_factor_form(spec):
    factor, _ = both(spec)
    ours, theirs = model(), model()
    train(factor, theirs, 15)
    trainer = train(
        lambda net, config: RacLoraTrainer(
            net, rule(spec), config, spec=spec, fused=True
        ),
        ours,
        15,
    )
    assert int(trainer.optimizer.step[...]) == 15
    assert_close(weights(ours), weights(theirs))
    with pytest.raises(TypeError, match="nothing may stand around it"):
        RacLoraTrainer(
            model(),
            optax.chain(rule(spec)),
            TrainingConfig(eval_every_n_steps=1000, max_steps=1),
            spec=spec,
            fused=True,
        )


def test_on_a_mesh(spec):
    """Eight devices, weights sharded as Tunix has them: their axes are to divide."""
    even = dataclasses.replace(CONFIG, vocab_size=68)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
    factor, _ = both(spec)
    alone = model(even)
    train(factor, alone, 12)
    with mesh:

        @nnx.jit
        def sharded():
            net = model(even)
            state = nnx.state(net)
            specs = nnx.get_partition_spec(state)
            nnx.update(net, jax.lax.with_sharding_constraint(state, specs))
            return net

        spread = sharded()
        train(factor, spread, 12)
    kernel = spread.layers[0].mlp.gate_proj.kernel[...]
    assert not kernel.sharding.is_fully_replicated
    assert_close(weights(spread), weights(alone))


def test_checkpoints_go_on_at_the_same_bits(spec, tmp_path):
    factor, _ = both(spec)
    whole = model()
    train(factor, whole, 14)

    options = {
        "checkpoint_root_directory": str(tmp_path / "run"),
        "checkpointing_options": ocp.CheckpointManagerOptions(save_interval_steps=1),
    }
    first, again = model(), model()
    train(factor, first, 8, **options)
    trainer = train(factor, again, 14, **options)
    assert trainer.train_steps == 14
    jax.tree.map(np.testing.assert_array_equal, weights(again), weights(whole))


def test_accumulation_is_the_inner_rule_s(spec):
    inner = optax.MultiSteps(optax.scale_by_adam(), 2)
    config = {"gradient_accumulation_steps": 2}

    def make(net, config):
        return RacLoraTrainer(net, rule(spec, inner), config, spec=spec)

    def dropin(net, config):
        return PeftTrainer(net, rule(spec, inner), config)

    ours, theirs = model(), model()
    trainer = train(make, ours, 6, **config)
    assert trainer.train_steps == 6
    assert trainer.iter_steps == 12
    # Drop-in, the same inner rule takes the same mini-steps.
    train(dropin, theirs, 12)
    assert_close(weights(ours), weights(theirs))
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2.*MultiSteps"):
        train(both(spec)[0], model(), 2, **config)


def test_dpo(spec):
    def pairs():
        for example in examples(6, rows=4):
            tokens = np.concatenate([example.input_tokens, example.input_tokens[::-1]])
            mask = np.ones_like(tokens, bool)
            yield TrainExample(
                input_ids=tokens,
                positions=utils.build_positions_from_mask(mask),
                attention_mask=utils.make_causal_attn_mask(mask),
                ref_chosen_logps=None,
                ref_rejected_logps=None,
                completion_mask=mask[:, 1:][:, -4:],
                logits_to_keep=4,
            )

    config = DPOTrainingConfig(eval_every_n_steps=1000, max_steps=6)
    ours, theirs = model(), model()
    trainer = RacLoraDPOTrainer(ours, None, rule(spec), config, spec=spec)
    other = DPOTrainer(theirs, None, rule(spec), config)
    for each in (trainer, other):
        each._prepare_inputs = lambda example: example
        each.train(pairs())
    assert_close(weights(ours), weights(theirs))


def test_a_model_with_lora_modules_is_refused(spec):
    import qwix

    provider = qwix.LoraProvider(module_path=".*proj", rank=2, alpha=2.0)
    batch = inputs(next(examples(1)))
    net = qwix.apply_lora_to_model(
        model(),
        provider,
        batch["input_tokens"],
        batch["positions"],
        None,
        batch["attention_mask"],
    )
    with pytest.raises(ValueError, match="has LoRA modules"):
        train(both(spec)[0], net, 2)
