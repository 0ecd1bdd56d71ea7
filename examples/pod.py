"""Pod: one program for a laptop, for several processes and for a TPU slice.

Trains a small Llama-like model on bytes of text, sharded by FSDP and tensor parallelism.
Stopped by SIGTERM or killed, it goes on when started again: with the same bits on the
same devices, and up to rounding on as many as there are then.

    python examples/pod.py --directory runs/pod
    python examples/pod.py --directory gs://... --distributed --tp 4  # on each host
"""

import argparse
import functools
import os
import pathlib
import signal

from needs import extra

with extra("pod", __name__):
    import grain
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import raclora_jax as rl
    from raclora_jax import checkpoint
    from raclora_jax.sharding import state_shardings

VOCAB, HEADS = 256, 4
# Where each weight lives: its embedding axis over "fsdp", heads and hidden over "tp".
AXES = {
    "embed": P("tp", "fsdp"),
    "qkv": P(None, None, "fsdp", "tp", None),
    "out": P(None, "tp", None, "fsdp"),
    "gate": P(None, "fsdp", "tp"),
    "up": P(None, "fsdp", "tp"),
    "down": P(None, "tp", "fsdp"),
    "norms": P(None, None, "fsdp"),
    "head": P("fsdp", "tp"),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = functools.partial(parser.add_argument, help=" ")
    add("--directory", required=True, help="checkpoints; all processes must see it")
    add("--data-dir", help="folder of *.txt and *.py; default: Python's own library")
    add("--form", choices=("fused", "factor", "dense"), default="fused")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, value in (("steps", 100), ("save-every", 20), ("log-every", 10)):
        add(f"--{name}", type=int, default=value)
    for name, value in (("layers", 2), ("width", 64), ("length", 64), ("batch", 8)):
        add(f"--{name}", type=int, default=value)
    add("--rank", type=int, default=8)
    add("--fsdp", type=int, help="devices that share the weights; default: all others")
    add("--tp", type=int, default=1, help="devices that share heads and hidden units")
    add("--distributed", action="store_true", help="this is one of several processes")
    add("--coordinator", help="host:port of process 0, where the cluster does not say")
    add("--processes", type=int, help="how many, where the cluster does not say")
    add("--process", type=int, help="which one, where the cluster does not say")
    return parser.parse_args()


class Windows:
    """Text as windows of bytes: a random-access source, as grain wants one."""

    def __init__(self, folder, length):
        files = sorted(p for p in folder.glob("*") if p.suffix in (".txt", ".py"))
        if not files:
            raise SystemExit(f"--data-dir {folder} holds no *.txt or *.py")
        self.text = np.frombuffer(b"".join(p.read_bytes() for p in files), np.uint8)
        self.length = length

    def __len__(self):
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index):
        start = index * self.length
        return self.text[start : start + self.length + 1].astype(np.int32)


def batches(options, rows):
    """This process's rows of every global batch: row i is sample i on any number.

    Processes that share heads and hidden units with others read the same rows as these.
    """
    folder = pathlib.Path(options.data_dir or os.path.dirname(os.__file__))
    if options.batch % rows.mesh.shape["fsdp"]:
        raise SystemExit(
            f"--batch must be a multiple of --fsdp {rows.mesh.shape['fsdp']}"
        )
    shape = (options.batch, options.length + 1)
    slices = rows.addressable_devices_indices_map(shape).values()
    held = sorted({row for s, _ in slices for row in range(options.batch)[s]})
    part, rest = divmod(held[0], len(held))
    if rest or options.batch % len(held) or held != [*range(held[0], held[-1] + 1)]:
        raise SystemExit(f"a process holds the rows {held}: order the mesh by processes")
    data = grain.MapDataset.source(Windows(folder, options.length)).shuffle(seed=0)
    data = data.repeat().batch(len(held))[part :: options.batch // len(held)]
    return iter(data.to_iter_dataset())


def init(key, options):
    D, H, L = options.width, HEADS, options.layers
    shapes = {
        "embed": (VOCAB, D),
        "qkv": (L, 3, D, H, D // H),
        "out": (L, H, D // H, D),
        "gate": (L, D, 3 * D),
        "up": (L, D, 3 * D),
        "down": (L, 3 * D, D),
        "head": (D, VOCAB),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {n: 0.05 * jax.random.normal(keys[n], shape) for n, shape in shapes.items()}
    params["norms"] = jnp.ones((L, 2, D))
    return jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)


def norm(x, scale):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * scale


def layer(x, w):
    h = norm(x, w["norms"][0])
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, w["qkv"][i]) for i in range(3))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("bthe,hed->btd", mixed, w["out"])
    h = norm(x, w["norms"][1])
    hidden = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
    return x + hidden @ w["down"], None


def loss_fn(params, tokens):
    stacked = {n: w for n, w in params.items() if n not in ("embed", "head")}
    x, _ = jax.lax.scan(layer, params["embed"][tokens[:, :-1]], stacked)
    logits = (x @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def mesh_of(options):
    count = jax.device_count()
    fsdp = options.fsdp or max(1, count // options.tp)
    if fsdp * options.tp > count:
        raise SystemExit(
            f"--fsdp {fsdp} x --tp {options.tp} asks for {fsdp * options.tp} devices, "
            f"there are {count}; nothing was read or written"
        )
    devices = jax.devices()[: fsdp * options.tp]
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((fsdp, options.tp), ("fsdp", "tp"), auto, devices=devices)


def compiled_step(tx, spec, form, shardings):
    factor_grad, dense_grad = (
        rl.value_and_grad(loss_fn, spec),
        jax.value_and_grad(loss_fn),
    )

    def factor(params, opt_state, tokens):
        loss, grads = factor_grad(params, opt_state, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return rl.apply_updates(params, updates), opt_state, loss

    def dense(params, opt_state, tokens):
        loss, grads = dense_grad(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    forms = {"fused": rl.fused_step(loss_fn, tx), "factor": factor, "dense": dense}
    return jax.jit(forms[form], donate_argnums=(0, 1), out_shardings=(*shardings, None))


def stop_asked():
    """``asked(step)``: whether SIGTERM came, at one step in every process."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    return lambda step: bool(heard)


def main():
    options = arguments()
    if options.distributed:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process
        )
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    mesh = mesh_of(options)
    rows = NamedSharding(mesh, P("fsdp", None))
    data = batches(options, rows)
    homes = {name: NamedSharding(mesh, spec) for name, spec in AXES.items()}

    make = functools.partial(init, options=options)
    shapes = jax.eval_shape(make, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((options.batch, options.length + 1), jnp.int32)
    spec = rl.trace_spec(loss_fn, shapes, tokens, rank=options.rank, resample_every=10)
    # Adam divides by the gradient's size: an eps below the rounding of a sum over devices
    # would blow up the order of that sum in entries without a signal.
    adam = optax.scale_by_adam(eps=1e-4)
    tx = rl.raclora(3e-3, spec, inner=adam, weight_decay=1e-4, key=1)
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=homes[name])
        for name, leaf in shapes.items()
    }
    shardings = homes, state_shardings(tx, placed)
    step_fn = compiled_step(tx, spec, options.form, shardings)
    asked = stop_asked()

    with checkpoint.Checkpointer(options.directory, spec) as checkpointer:
        done = 0
        if checkpointer.latest() is None:
            params = jax.jit(make, out_shardings=shardings[0])(jax.random.key(0))
            opt_state = jax.jit(tx.init, out_shardings=shardings[1])(params)
        else:
            like = checkpoint.abstract_state(tx, placed, shardings=shardings[1])
            done, (params, opt_state), position, _ = checkpointer.restore(like)
            data.set_state(position)
            say(f"restored step {done}", flush=True)
        while done < options.steps:
            batch = jax.make_array_from_process_local_data(rows, next(data), tokens.shape)
            params, opt_state, loss = step_fn(params, opt_state, batch)
            done += 1
            if done % options.log_every == 0:
                say(f"step {done} loss {loss:.4f}", flush=True)
            stop = asked(done)
            if stop or done % options.save_every == 0 or done == options.steps:
                checkpointer.save(done, (params, opt_state), data=data.get_state())
            if stop:
                say(f"asked to stop: saved step {done}", flush=True)
                break


if __name__ == "__main__":
    main()
