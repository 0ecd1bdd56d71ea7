"""MaxText's own training with RAC-LoRA for its optimizer, on one machine or a pod.

MaxText asks one function for its optimizer; this program answers in its place and leaves
the rest to MaxText: model, mesh, data, schedule, checkpoints. Its rule for the state's
shardings reads the marks of the parameters, which the state of raclora carries on.

    python examples/maxtext/train.py --rank 64 base.yml run_name=a ...
"""

import argparse
import sys

import optax
from absl import app
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import raclora_jax as rl


def rules(config):
    """How MaxText lays out a decoder: layers of a scan are stacked on an axis inside."""
    layers = config.param_scan_axis if config.scan_layers else None
    return (
        rl.Rule(".*/(scale|bias)", mode="dense"),
        kernel("query|key|value", axes=4, rows=(0,), layers=layers),
        kernel("out", axes=4, rows=(0, 1), layers=layers),
        kernel("wi|wi_0|wi_1|wo", axes=3, rows=(0,), layers=layers),
    )


def kernel(names, axes, rows, layers):
    """A rule for kernels of so many axes, the stack of layers counted."""
    path = f".*/layers(_[0-9]+)?/.*/({names})/kernel"
    if layers is None:
        return rl.Rule(path, rows=rows)
    free = [axis for axis in range(axes) if axis != layers]
    return rl.Rule(path, rows=tuple(free[row] for row in rows), batch=layers)


def optimizer(options):
    """What takes the place of MaxText's ``get_optimizer``."""

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        del model, mesh
        if config.opt_type != "adamw":
            raise ValueError(
                f"opt_type={config.opt_type}: raclora has Adam inside here, with the "
                "numbers of adamw; leave opt_type out"
            )
        for name in ("skip_step_on_spikes", "trainable_parameters_mask", "adamw_mask"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} belongs to MaxText's own optimizers; freeze leaves by a "
                    "Rule, or leave it out"
                )
        spec = rl.Spec(
            rank=options.rank,
            alpha="dim",
            resample_every=options.resample_every,
            rules=rules(config),
        )
        return rl.raclora(
            learning_rate_schedule,
            spec,
            inner=optax.scale_by_adam(
                config.adam_b1,
                config.adam_b2,
                config.adam_eps,
                config.adam_eps_root,
                config.mu_dtype,
            ),
            weight_decay=config.adam_weight_decay,
            key=options.seed,
        )

    return get_optimizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="The rest goes to MaxText."
    )
    parser.add_argument("--rank", type=int, default=64, help="of every sketch")
    parser.add_argument("--resample-every", type=int, default=25, help="steps of a link")
    parser.add_argument("--seed", type=int, default=0, help="of the sketches")
    options, rest = parser.parse_known_args()
    optimizers.get_optimizer = optimizer(options)
    app.run(train.main, argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
