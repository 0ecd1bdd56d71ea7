"""Eight fake CPU devices for every test, so that sharded runs can be compared."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Nearly all the time of a test is that of the compiler, which need not try hard.
FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Compiled in parallel, a program has not the same bits each time.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later compilers end on a flag that they lack
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
chex.set_n_cpu_devices(8)

# Seconds each, for what a quicker case or another test shows too.
REPEATS = {
    "test_devices.py::test_same_steps[adam-orthonormal]",
    "test_explicit_meshes.py::test_explicit_is_automatic_is_one_device"
    "[AxisType.Explicit-shape1-both-dense-right]",
    "test_explicit_meshes.py::test_explicit_is_automatic_is_one_device"
    "[AxisType.Explicit-shape2-fsdp-factor-right]",
    "test_finetune_glue.py::test_a_stopped_run_goes_on[raclora]",
    "test_forms.py::test_all_forms_are_one_trajectory[orthogonal-auto-4-only4-orthonormal]",
    "test_forms.py::test_all_forms_are_one_trajectory[orthogonal-auto-7-only7-block]",
    "test_forms.py::test_all_forms_are_one_trajectory[orthogonal-left-5-only5-coordinate]",
    "test_forms.py::test_all_forms_are_one_trajectory[orthogonal-left-8-only8-block]",
    "test_forms.py::test_all_forms_are_one_trajectory[trace-left-1-only1-orthonormal]",
    "test_gradient_runs.py::test_three_hundred_steps_of_a_decoder[left]",
    "test_orthogonal.py::test_no_gradient_gives_no_step_and_no_nan[bfloat16]",
    "test_quantized.py::test_small_steps_add_up_over_200_merges[nf4-None]",
    "test_rounding.py::test_dense_form_and_factor_form_draw_the_same_neighbours[auto]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[bfloat16-left-coordinate]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[bfloat16-right-block]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[bfloat16-right-coordinate]",
    "test_sketch.py::test_drawn_together_or_alone[rademacher]",
    "test_sketch.py::test_other_leaves_and_tree_order_do_not_enter[rademacher]",
    "test_sketch.py::test_small_sketches_are_orthonormal_at_any_rank[rademacher]",
    "test_sketch.py::test_the_process_and_its_transformations_do_not_enter[rademacher]",
    "test_strict.py::test_under_debugging_switches[others, float32-dense]",
    "test_unmerged.py::test_loss_and_gradient_are_those_of_the_sum[left]",
    "test_federated.py::test_vmap_shard_map_and_a_loop_agree[raclora-orthonormal]",
    "test_forms.py::test_all_forms_are_one_trajectory"
    "[orthogonal, momentum-right-6-only6-orthonormal]",
    "test_models.py::test_gradients_are_the_dense_ones_projected[decoder]",
    "test_quantized.py::test_small_steps_add_up_over_200_merges[int8-5]",
    "test_rounding.py::test_a_lift_is_one_sum_however_it_is_computed[16]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[bfloat16-left-block]",
    "test_variance_reduction.py::test_page_has_no_floor_and_mvr_a_lower_one[0]",
    "test_compiled.py::test_no_weight_gradient_in_a_whole_step[False-left]",
    "test_compiled.py::test_no_weight_gradient_in_a_whole_step[True-right]",
    "test_eager.py::test_outside_jit_and_in_the_users_own_traces[MultiSteps-dense]",
    "test_federated.py::test_replay_is_equal_to_the_last_bit[raclora-float32]",
    "test_models.py::test_gradients_are_the_dense_ones_projected[decoder, scan]",
    "test_optax_contract.py::test_accumulation_inside[dense-2-1-keep]",
    "test_optax_contract.py::test_accumulation_inside[factor-2-3-reset]",
    "test_optax_contract.py::test_rules_around_the_inner_rule_change_nothing[dense-injected]",
    "test_optax_contract.py::test_rules_around_the_inner_rule_change_nothing[factor-masked]",
    "test_optax_contract.py::test_state_is_stable_under_cond[float16-reset]",
    "test_optax_contract.py::test_state_is_stable_under_cond[bfloat16-transport]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[float32-left-coordinate]",
    "test_select.py::test_gradients_of_a_model_in_its_own_dtype[float32-right-block]",
    "test_sketch.py::test_drawn_together_or_alone[coordinate]",
    "test_strict.py::test_under_debugging_switches[others, bfloat16-dense]",
    "test_strict.py::test_under_debugging_switches[others, float32-factor]",
    "test_updates.py::test_it_lands_on_its_own_sketch[coordinate-True]",
    "test_updates.py::test_rules_after_it_that_scale[coordinate]",
    "test_updates.py::test_the_same_bits_wherever_it_was_applied[block-nearest]",
    "test_updates.py::test_the_same_bits_wherever_it_was_applied[orthonormal-master]",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    names = {item.nodeid.removeprefix("tests/"): item for item in items}
    for name in REPEATS & {*names}:
        names[name].add_marker(pytest.mark.slow)
    if any("::" in word for word in config.args):
        return
    files = {name.partition("::")[0] for name in names}
    gone = {name for name in REPEATS - {*names} if name.partition("::")[0] in files}
    if gone:
        raise pytest.UsageError(f"tests/conftest.py names no test: {sorted(gone)}")


@pytest.fixture(scope="module")
def quick_draws():
    """Sketches by a formula, since compiling threefry costs more than all the rest.

    Oracle and library see the same ones. What was compiled with them is forgotten after.
    """

    def fold_in(key, data):
        words = jax.random.key_data(key) * jnp.uint32(747796405)
        return jax.random.wrap_key_data(words + jnp.asarray(data).astype(jnp.uint32))

    def normal(key, shape, dtype=jnp.float32):
        start = jnp.sum(jax.random.key_data(key), dtype=jnp.uint32)
        bits = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.uint32) + start
        bits = (bits * jnp.uint32(2654435761)) ^ (bits >> 5)
        return ((bits >> 8).astype(dtype) / 2**23 - 1).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "fold_in", fold_in)
        patch.setattr(jax.random, "normal", normal)
        jax.clear_caches()
        yield
    jax.clear_caches()
