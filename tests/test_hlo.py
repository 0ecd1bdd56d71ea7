"""What devices exchange, read off compiled programs: hand-made ones and real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks.pods import pod_costs, pod_steps
from benchmarks.shared import hlo, models, rivals
from benchmarks.shared.hlo_text import Program
from benchmarks.speed import data_parallel

# As a TPU's compiler writes them: no trip counts, layouts with tiles, groups as axes of a
# mesh, and a gather that is spread over fusions, one of them inside an inner loop.
TPU = """\
HloModule jit_step, is_scheduled=true

%start (p.0: bf16[1,16,88]) -> (bf16[1,16,88], bf16[1,64,88]) {
  %p.0 = bf16[1,16,88]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag.0 = bf16[1,64,88]{2,1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}, use_global_device_ids=true
  ROOT %c.0 = (bf16[1,16,88]{2,1,0}, bf16[1,64,88]{2,1,0}) custom-call(%ag.0), \
custom_call_target="AsyncCollectiveStart"
}

%inner (t.1: (s32[], bf16[1,16,88])) -> (s32[], bf16[1,16,88]) {
  %x.1 = bf16[1,16,88]{2,1,0:T(8,128)} parameter(0)
  %ag.1 = bf16[1,64,88]{2,1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}, use_global_device_ids=true
}

%inner_condition (t.2: (s32[], bf16[1,16,88])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(8)
  %t.2 = (s32[]{:T(128)}, bf16[1,16,88]{2,1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %limit.2), direction=LT
}

%layer (t.3: (s32[], f32[4,88])) -> (s32[], f32[4,88]) {
  %t.3 = (s32[]{:T(128)}, f32[4,88]{1,0:T(8,128)}) parameter(0)
  %a.3 = bf16[1,16,88]{2,1,0:T(8,128)} parameter(1)
  %f.3 = (bf16[1,16,88]{2,1,0}, bf16[1,64,88]{2,1,0}) fusion(%a.3), calls=%start
  %w.3 = (s32[]{:T(128)}, bf16[1,16,88]{2,1,0}) while(%t.3), \
condition=%inner_condition, body=%inner
  %g.3 = f32[4,88]{1,0:T(8,128)} fusion(%a.3), kind=kOutput, calls=%add
  ROOT %sum.3 = f32[4,88]{1,0:T(8,128)} all-reduce(%g.3), channel_id=5, \
replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
}

%fused_compare (i.4: s32[]) -> pred[] {
  %i.4 = s32[]{:T(128)} parameter(0)
  %limit.4 = s32[]{:T(128)} constant(32)
  ROOT %lt.4 = pred[]{:T(512)} compare(%i.4, %limit.4), direction=LT
}

%layer_condition (t.5: (s32[], f32[4,88])) -> pred[] {
  %t.5 = (s32[]{:T(128)}, f32[4,88]{1,0:T(8,128)}) parameter(0)
  %i.5 = s32[]{:T(128)} get-tuple-element(%t.5), index=0
  ROOT %f.5 = pred[]{:T(512)} fusion(%i.5), kind=kLoop, calls=%fused_compare
}

%until_it_converges (t.6: (s32[], f32[])) -> pred[] {
  %t.6 = (s32[]{:T(128)}, f32[]{:T(128)}) parameter(0)
  %i.6 = s32[]{:T(128)} get-tuple-element(%t.6), index=0
  %limit.6 = s32[]{:T(128)} constant(4096)
  %lt.6 = pred[]{:T(512)} compare(%i.6, %limit.6), direction=LT
  %more.6 = pred[]{:T(512)} get-tuple-element(%t.6), index=1
  ROOT %and.6 = pred[]{:T(512)} and(%lt.6, %more.6)
}

%search (t.7: (s32[], f32[])) -> (s32[], f32[]) {
  %t.7 = f32[]{:T(128)} parameter(0)
  %r.7 = f32[]{:T(128)} all-reduce(%t.7), channel_id=6, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%place (z.8: f32[64,8], s.8: f32[16,8], at.8: u32[]) -> f32[64,8] {
  %z.8 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %s.8 = f32[16,8]{1,0:T(8,128)} parameter(1)
  %at.8 = u32[]{:T(128)S(6)} parameter(2)
  ROOT %d.8 = f32[64,8]{1,0:T(8,128)} dynamic-update-slice(%z.8, %s.8, %at.8)
}

%wrapped (p.9: f32[16,8]) -> f32[64,8] {
  %p.9 = f32[16,8]{1,0} parameter(0)
  ROOT %ag.9 = f32[64,8]{1,0} all-gather(%p.9), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: f32[16,8], b: f32[64,88]) -> f32[] {
  %a = f32[16,8]{1,0:T(8,128)} parameter(0)
  %b = f32[64,88]{1,0:T(8,128)} parameter(1)
  %zero = f32[]{:T(128)} constant(0)
  %zeros = f32[64,8]{1,0:T(8,128)} broadcast(%zero), dimensions={}
  %at = u32[]{:T(128)} partition-id()
  %one = f32[64,8]{1,0:T(8,128)} fusion(%zeros, %a, %at), kind=kLoop, calls=%place
  %two = f32[64,8]{1,0:T(8,128)} dynamic-update-slice(%zeros, %a, %at)
  %true = f32[16,8]{1,0:T(8,128)} add(%a, %a)
  %all = (f32[64,8]{1,0}, f32[64,8]{1,0}, f32[16,8]{1,0}) all-reduce(%one, %two, %true), \
channel_id=7, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  %written = f32[64,88]{1,0:T(8,128)} dynamic-update-slice(%b, %a, %at)
  %rs = f32[16,88]{1,0:T(8,128)} reduce-scatter(%written), channel_id=8, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, to_apply=%add
  %later = ((f32[16,8]{1,0}), f32[64,8]{1,0}, u32[]) async-start(%a), calls=%wrapped
  %now = f32[64,8]{1,0} async-done(%later), calls=%wrapped
  %cp = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%a), channel_id=10, source_target_pairs={{0,1},{1,0}}
  %layers = (s32[]{:T(128)}, f32[4,88]{1,0}) while(%a), condition=%layer_condition, \
body=%layer
  %found = (s32[]{:T(128)}, f32[]{:T(128)}) while(%a), condition=%until_it_converges, \
body=%search
}
"""


@pytest.fixture(scope="module")
def found():
    return {
        (one.kind, hlo._CHANNEL.search(one.where)[1]): one for one in hlo.collectives(TPU)
    }


def test_a_condition_tells_how_long_a_loop_is(found):
    trips = Program(TPU).trips
    assert trips["layer"] == 32
    assert trips["inner"] == 32 * 8
    # Where more than the count decides, the constant is only a bound.
    assert trips["search"] == 1
    assert found["all-reduce", "5"].carried == 32 * 4 * 88 * 4


def test_a_gather_in_pieces_is_one(found):
    gather = found["all-gather", "3"]
    assert (gather.trips, gather.bytes, gather.devices) == (32, 64 * 88 * 2, 4)


def test_a_start_and_its_end_are_one(found):
    gather = found["all-gather", "9"]
    assert (gather.trips, gather.bytes, gather.devices) == (1, 64 * 8 * 4, 4)
    assert found["collective-permute", "10"].bytes == 16 * 8 * 4


def test_a_sum_of_shards_among_zeros_is_a_gather(found):
    """Joined with a true sum, each counts for itself."""
    assert found["all-gather", "7"].bytes == 2 * 64 * 8 * 4
    assert found["all-reduce", "7"].bytes == 16 * 8 * 4
    # What is written into an array that has values is no shard of a gather.
    assert ("all-gather", "8") not in found


def test_kinds_and_their_bytes_around_a_ring(found):
    assert len(found) == 8
    scatter, total = found["reduce-scatter", "8"], found["all-reduce", "5"]
    assert scatter.bytes == 64 * 88 * 4
    np.testing.assert_allclose(scatter.ring_bytes, 3 / 4 * 64 * 88 * 4)
    np.testing.assert_allclose(total.ring_bytes, 2 * 3 / 4 * total.carried)
    assert found["all-reduce", "6"].devices == 8
    assert found["collective-permute", "10"].ring_bytes == 16 * 8 * 4


def test_weights_are_told_by_their_shape(found):
    shapes = {"up": (64, 88)}
    gathers = hlo.of_weights(found.values(), shapes, ("all-gather",))
    assert [one.where for one in gathers] == [found["all-gather", "3"].where]
    sums = hlo.of_weights(found.values(), shapes, ("all-reduce", "reduce-scatter"))
    assert [one.kind for one in sums] == ["reduce-scatter"]


def test_kinds_add_up(found):
    sizes = hlo.collective_bytes(TPU)
    for kind in {kind for kind, _ in found}:
        own = [one.carried for (k, _), one in found.items() if k == kind]
        assert sizes[kind] == sum(own)
    costs = pod_costs.exchanged(found.values())
    np.testing.assert_allclose(costs["total_gb"], sum(sizes.values()) / 1e9)
    rings = sum(one.ring_bytes for one in found.values()) / 1e9
    np.testing.assert_allclose(costs["total_ring_gb"], rings)


def test_gathers_of_a_real_program_are_those_of_its_weights():
    """Sharded weights under a scan: each is gathered once a layer and direction."""
    layers, width, hidden = 3, 64, 96
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))

    def on(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    weights = {
        "up": on((layers, width, hidden), None, "fsdp"),
        "down": on((layers, hidden, width), None, None, "fsdp"),
    }
    x = on((512, width), "fsdp")
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))

    def loss(x, weights):
        @jax.checkpoint
        def layer(x, w):
            y = lax.with_sharding_constraint(jnp.tanh(x @ w["up"]) @ w["down"], rows)
            return y, None

        return jnp.mean(lax.scan(layer, x, weights)[0] ** 2)

    program = jax.jit(jax.grad(loss)).lower(x, weights).compile()
    shapes = {name: one.shape[1:] for name, one in weights.items()}
    found = hlo.of_weights(hlo.collectives(program.as_text()), shapes, ("all-gather",))
    once = sum(layers * width * hidden * 4 for _ in shapes)
    assert sum(one.trips for one in found) == 2 * layers * len(shapes)
    assert sum(one.carried for one in found) == 2 * once


@pytest.mark.slow
def test_data_parallel_sums_the_factors_and_the_loss():
    """Eight devices, the 512-wide decoder, rank 8: a fiftieth of full fine-tuning."""
    model = models.decoder(sequences=8, length=64, scan=True, remat=True)
    params, _ = model.shapes()
    costs = rl.summary(params, rivals.spec_of(model, side="left"))
    loss = 4

    def sent(method):
        return {k: v * 2**20 for k, v in data_parallel.traffic(model, method).items()}

    ours = sent(rivals.ours(model, side="left"))
    full = sent(rivals.adamw(model))
    assert ours == {"all_reduce_mib": costs.total.traffic_bytes + loss}
    assert full == {"all_reduce_mib": costs.full.traffic_bytes + loss}
    assert ours["all_reduce_mib"] <= full["all_reduce_mib"] / 50


def test_operations_of_a_staged_step():
    def step(x, ws, flag):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)
        return lax.cond(flag, lambda: x @ ws[0] @ ws[1], lambda: x)

    x, ws = jnp.ones((9, 32)), jnp.ones((5, 32, 32))
    staged = jax.make_jaxpr(jax.jit(step))(x, ws, True)
    assert pod_costs.product_flops(staged.jaxpr) == (5 + 2) * 2 * 9 * 32 * 32


def test_a_step_takes_at_least_its_dearest_part(found):
    chip = pod_costs.Chip(flops=1e12, memory=1e9, bandwidth=1e9, links=1e6)
    gathers = [found["all-gather", "7"], found["all-reduce", "5"]]
    bound = pod_costs.roofline(chip, 2e9, 1e6, gathers)
    moved = 3 / 4 * 2 * 64 * 8 * 4 + 2 * 3 / 4 * 32 * 4 * 88 * 4
    assert bound == pytest.approx(
        {
            "compute_ms": 2.0,
            "memory_ms": 1e3 * (1e6 + 2 * 2 * 64 * 8 * 4) / 1e9,
            "links_ms": 1e3 * moved / 1e6,
            "bound_ms": 1e3 * moved / 1e6,
        }
    )


# --- The steps that the pod study compiles ----------------------------------------------

SIZES = pod_steps.Sizes(width=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64)


@pytest.fixture(scope="module")
def small():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto, AxisType.Auto))
    return mesh, pod_steps.llama(SIZES, 4, 16, mesh)


@pytest.mark.parametrize("name", pod_steps.METHODS)
def test_a_state_lies_as_its_weights(small, name):
    mesh, model = small
    method = pod_steps.METHODS[name](model, SIZES.width)
    state = jax.eval_shape(method.init, jax.random.key(0))
    for leaf in jax.tree.leaves(pod_steps.placed(state, SIZES, mesh)):
        held = np.prod(leaf.sharding.shard_shape(leaf.shape))
        if leaf.ndim > 2 and leaf.size > 2**10:  # a stack of matrices or of factors
            assert held <= leaf.size / 4, leaf


@pytest.mark.slow
def test_methods_train_one_model(small):
    """Frozen, in full, or with pairs that are still zero: the first loss is the same."""
    mesh, model = small
    batch = model.batch(jax.random.key(1))
    losses = {}
    for name in ("floor", "AdamW", "LoRA"):
        method = pod_steps.METHODS[name](model, SIZES.width)
        state = method.init(jax.random.key(0))
        homes = pod_steps.placed(state, SIZES, mesh)
        state = jax.tree.map(
            lambda x, home: jax.device_put(x, home.sharding), state, homes
        )
        _, losses[name] = jax.jit(method.step)(state, batch)
    # bfloat16 through two layers, in programs that round in other places.
    np.testing.assert_allclose([*losses.values()], losses["floor"], rtol=2**-7)
    assert losses["floor"] > 1
