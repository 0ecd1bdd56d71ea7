"""Training steps of Llama 7B, 13B and 70B compiled for TPU slices, without a TPU.

The compiler for TPUs needs none: for each slice it gives the program that a pod would
run, and with it the memory of a device, the bytes that devices exchange and what the
compiler itself takes. One program is compiled at a time, in a process of its own, and
its row is saved at once; rows that are there already are kept. Needs the extra ``tpu``.

    python -m benchmarks.pods.pod [--quick] [--full] [--studies slices,fits,one_chip]
                             [--only REGEX] [--effort -1]

``slices`` compiles every method on a grid of models, slices, meshes and lengths; ``fits``
looks for the smallest v5e slice whose program the compiler accepts, at 4096 tokens a
chip; ``one_chip`` compiles what a single chip is asked to hold. ``--full`` takes the
whole grid: hours. ``--effort`` is XLA's, from -1 to 1, for both the speed and the memory
of the program; rows say it, and 0 is what a user gets.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.pods import pod_costs, pod_steps
from benchmarks.shared import hlo, timing
from benchmarks.shared.results import Results, side_by_side

# In place of the machine that the compiler would ask about its slice, and of its lock.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
SLICES = {
    "v5e-1": "v5e:1x1",
    "v6e-1": "v6e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v5e-32": "v5e:4x8",
    "v5e-64": "v5e:8x8",
    "v5e-128": "v5e:8x16",
    "v5e-256": "v5e:16x16",
    "v5p-64": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
}


# One chip is a slice once the bounds of a host say so.
ALONE_ON_HOST = ("v5e-1", "v6e-1")


class Point(NamedTuple):
    """Where a method is compiled.

    Attributes:
      model: A key of ``pod_steps.LLAMA``.
      slice: A key of ``SLICES``; the number counts chips.
      tensor: Size of the tensor-parallel axis; the rest of the chips is FSDP.
      length: Tokens of a sequence, of which every FSDP group has one.
    """

    model: str
    slice: str
    tensor: int = 1
    length: int = 4096

    @property
    def study(self) -> str:
        """What rows call it, but for the effort."""
        tensor = f", tp {self.tensor}" if self.tensor > 1 else ""
        return f"{self.model}, {self.slice}{tensor}, {self.length}"


class Job(NamedTuple):
    """One program to compile."""

    point: Point
    method: str
    effort: float

    @property
    def study(self) -> str:
        """What its row is compared within: one model, slice, mesh, length and effort."""
        return self.point.study + (f", effort {self.effort:g}" if self.effort else "")


CHOSEN = (
    Point("7B", "v5e-256"),
    Point("70B", "v5e-256"),
    Point("7B", "v5e-256", tensor=4),
    Point("70B", "v5e-256", tensor=4),
    Point("7B", "v5e-64"),
    Point("13B", "v5e-256"),
    Point("7B", "v5p-64"),
    Point("7B", "v6e-256", length=8192),
)
FULL = tuple(
    itertools.starmap(
        Point,
        itertools.product(
            ("7B", "13B", "70B"),
            ("v5e-256", "v5e-64", "v5p-64", "v6e-256"),
            (1, 4),
            (4096, 8192),
        ),
    )
)
ONE_CHIP = tuple(
    Point(model, chip, 1, length)
    for model, chip in (
        ("7B", "v5e-1"),
        ("8B", "v5e-1"),
        ("8B", "v6e-1"),
        ("13B", "v6e-1"),
    )
    for length in (2048, 4096)
)
QUICK = (Point("tiny", "v5e-16", 1, 512), Point("tiny", "v5e-16", 4, 512))
# From where the search for the smallest slice starts: below, the weights are too much.
FITS_FROM = {"7B": 0, "13B": 0, "70B": 2, "tiny": 0}
FITS_ON = [n for n in SLICES if n.startswith("v5e") and n not in ALONE_ON_HOST]


def compiled(job: Job) -> dict[str, Any]:
    """The row of one program; if it does not fit, what the compiler says of it."""
    point = job.point
    jax.config.update("jax_exec_time_optimization_effort", job.effort)
    jax.config.update("jax_memory_fitting_effort", job.effort)
    one: Any = (
        {"chips_per_host_bounds": (1, 1, 1)} if point.slice in ALONE_ON_HOST else {}
    )
    topology = topologies.get_topology_desc(SLICES[point.slice], "tpu", **one)
    chips = len(topology.devices)
    split = (chips // point.tensor, point.tensor)
    # A slice of 16 x 16 chips as 64 x 4 cuts one of its own axes.
    devices = mesh_utils.create_device_mesh(
        split, topology.devices, allow_split_physical_axes=True
    )
    mesh = Mesh(devices, ("fsdp", "tp"))
    sizes = pod_steps.LLAMA[point.model]
    model = pod_steps.llama(sizes, split[0], point.length, mesh)
    methods = pod_steps.METHODS | pod_steps.ONE_CHIP
    method = methods[job.method](model, sizes.width)
    key, rows = jax.random.key(0), NamedSharding(mesh, PartitionSpec("fsdp"))
    state = pod_steps.placed(jax.eval_shape(method.init, key), sizes, mesh)
    batch = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=rows),
        jax.eval_shape(model.batch, key),
    )
    row = {"study": job.study, "method": job.method, "effort": job.effort}
    row |= point._asdict() | {"chips": chips}
    start = time.process_time()
    homes = jax.tree.map(lambda one: one.sharding, state)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(method.step, donate_argnums=0, out_shardings=(homes, whole))
    traced = step.trace(state, batch)
    lowered = traced.lower()
    staged = time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "error": str(error).splitlines()[0]}
    spent = {
        "trace_cpu_seconds": round(staged - start, 2),
        "compile_cpu_seconds": round(time.process_time() - staged, 1),
    }
    flops = pod_costs.product_flops(traced.jaxpr) / chips
    return row | {"fits": True} | spent | _read(program, point, flops)


def _read(program: Any, point: Point, flops: float) -> dict[str, Any]:
    """What a compiled program says of itself, all of it for one device."""
    # Of some programs for one chip the text cannot be had, and it exchanges nothing.
    text = "" if point.slice in ALONE_ON_HOST else program.as_text()
    memory, exchanges = program.memory_analysis(), hlo.collectives(text)
    shapes = pod_steps.gathered_shapes(pod_steps.LLAMA[point.model], point.tensor)
    gathers = hlo.of_weights(exchanges, shapes, ("all-gather",))
    sums = hlo.of_weights(exchanges, shapes, ("all-reduce", "reduce-scatter"))
    chip = pod_costs.CHIPS[point.slice.split("-")[0]]
    held = memory.argument_size_in_bytes
    return {
        "arguments_mib": held / timing.MIB,
        "temporaries_mib": memory.temp_size_in_bytes / timing.MIB,
        "peak_mib": memory.peak_memory_in_bytes / timing.MIB,
        "tflops": flops / 1e12,
        **pod_costs.exchanged(exchanges),
        "weight_gathers": sum(one.trips for one in gathers),
        "weight_gathers_gb": sum(one.carried for one in gathers) / pod_costs.GB,
        "weight_sums": sum(one.trips for one in sums),
        **pod_costs.roofline(chip, flops, held, exchanges),
    }


def study_slices(points: Iterable[Point], add: Callable[..., dict[str, Any]]) -> None:
    """Every method at every point."""
    for point, method in itertools.product(points, pod_steps.METHODS):
        add(point, method)


def study_one_chip(points: Iterable[Point], add: Callable[..., dict[str, Any]]) -> None:
    """What one chip takes, by each method."""
    for point, method in itertools.product(points, pod_steps.ONE_CHIP):
        add(point, method)


def study_fits(models: Iterable[str], add: Callable[..., dict[str, Any]]) -> None:
    """Every method on larger and larger slices, up to one that the compiler accepts."""
    for model, method in itertools.product(models, pod_steps.METHODS):
        for name in FITS_ON[FITS_FROM[model] :]:
            if add(Point(model, name), method).get("fits", True):
                break


def main() -> None:
    """Compiles what is missing."""
    parser = timing.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="the whole grid: hours")
    parser.add_argument("--studies", default="slices,fits,one_chip")
    parser.add_argument("--only", default="", help="part of 'study, method', a regex")
    parser.add_argument("--effort", type=float, default=0.0, help="of XLA, -1 to 1")
    options = timing.parse(parser, __file__)
    os.environ.update(ALONE)
    jax.config.update("jax_platforms", "cpu")
    path = options.out / "pod.json" if options.out else None
    results = Results(path, "pods.pod", libtpu=importlib.metadata.version("libtpu"))

    def add(point: Point, method: str) -> dict[str, Any]:
        """The row, compiled if there is none; nothing for what is not asked for."""
        job = Job(point, method, options.effort)
        row = results.get(job.study, method)
        if not re.search(options.only, f"{job.study}, {method}"):
            return row or {}
        if row is None:
            ((_, row),) = side_by_side(compiled, [job], workers=1, each=1)
            results.add(row)
            print(json.dumps(row), flush=True)
        return row

    studies = options.studies.split(",")
    if "slices" in studies:
        study_slices(QUICK if options.quick else FULL if options.full else CHOSEN, add)
    if "one_chip" in studies:
        study_one_chip(
            [Point("tiny", "v5e-1", 1, 512)] if options.quick else ONE_CHIP, add
        )
    if "fits" in studies:
        study_fits(["tiny"] if options.quick else ["7B", "13B", "70B"], add)


if __name__ == "__main__":
    main()
