"""MaxText's own training on 8 devices with raclora for its optimizer.

MaxText needs Python 3.12 or newer and is no requirement: without it these tests skip.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = ROOT / "examples" / "maxtext" / "train.py"
found = importlib.util.find_spec("maxtext")
pytestmark = pytest.mark.skipif(found is None, reason="maxtext is not installed")

TINY = [
    "base_emb_dim=64",
    "base_num_query_heads=4",
    "base_num_kv_heads=4",
    "base_mlp_dim=128",
    "base_num_decoder_layers=2",
    "head_dim=16",
    "vocab_size=256",
    "max_target_length=64",
    "per_device_batch_size=1",
    "dataset_type=synthetic",
    "attention=dot_product",
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "learning_rate=1e-2",
    "learning_rate_schedule_steps=12",
    "async_checkpointing=false",
    "checkpoint_period=5",
]
# What MaxText made of every array of the optimizer's state, said before the first step.
SHOWN = """
import jax, runpy, sys
from maxtext.utils import maxtext_utils
setup = maxtext_utils.setup_training_state
def shown(*args, **kwargs):
    answer = setup(*args, **kwargs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(answer[0]):
        print("STATE", jax.tree_util.keystr(path), leaf.shape, leaf.sharding.spec)
    return answer
maxtext_utils.setup_training_state = shown
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(folder, name, mesh, *words):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
        "DECOUPLE_GCLOUD": "TRUE",
    }
    base = pathlib.Path(found.submodule_search_locations[0]) / "configs" / "base.yml"
    ours = ["--rank", "8", "--resample-every", "5", base, f"run_name={name}"]
    where = [f"base_output_directory={folder}", *mesh]
    process = subprocess.run(
        [sys.executable, "-c", SHOWN, PROGRAM, *ours, *TINY, *where, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    losses = re.findall(r"completed step: (\d+),.*? loss: ([\d.]+)", process.stderr)
    state = re.findall(r"STATE (\S+) .* P(\(.*\))", process.stdout)
    return {int(step): float(loss) for step, loss in losses}, dict(state)


SPLIT = ["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"]


@pytest.mark.slow
def test_learns_on_every_mesh_and_goes_on_from_its_checkpoints(tmp_path):
    whole, state = train(tmp_path, "whole", SPLIT, "steps=12")
    assert whole[11] < 0.6 * whole[0]
    moments = {path: spec for path, spec in state.items() if re.search("'[mn]u'", path)}
    moments = {path: spec for path, spec in moments.items() if "'lowrank'" in path}
    assert len(moments) == 2 * 9  # two moments of nine matrices
    for path, spec in moments.items():
        assert "fsdp" in spec or "tensor" in spec, path
    alone, _ = train(
        tmp_path,
        "alone",
        ["ici_data_parallelism=8", "ici_fsdp_parallelism=1"],
        "steps=12",
    )
    assert alone[11] == pytest.approx(whole[11], abs=5e-3)
    train(tmp_path, "cut", SPLIT, "steps=8")
    rest, _ = train(tmp_path, "cut", SPLIT, "steps=12")
    assert min(rest) == 8
    assert all(rest[step] == whole[step] for step in rest)


@pytest.mark.slow
def test_refuses_what_only_its_own_optimizers_do(tmp_path):
    with pytest.raises(AssertionError, match="skip_step_on_spikes belongs to MaxText"):
        train(tmp_path, "spikes", SPLIT, "steps=2", "skip_step_on_spikes=true")
