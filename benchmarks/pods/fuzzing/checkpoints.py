"""Damaged checkpoints and damaged logs of a chain.

A run of three checkpoints, or of three links, is written once for a seed and copied for
each case; then one or two things are done to the copy that disks, copies by hand and cut
transfers do. A checkpoint may come back as itself or as an older one, in all its bits;
the log of three links comes back as their weights or not at all.
"""

from __future__ import annotations

import functools
import pathlib
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import raclora_jax as rl
from benchmarks.pods.fuzzing.case import Case
from raclora_jax.checkpoint import ChainLog, Checkpointer

SPEC = rl.Spec(2, alpha=4.0, resample_every=25)
STEPS = (10, 20, 30)
LINKS = 3

Damage = Callable[[random.Random, pathlib.Path], str]


def checkpoint_cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """Directories of a run in which the newest checkpoint, or two, have been damaged.

    Args:
      seed: Of the damage.
      count: How many.
      folder: An empty one; of every case only what it needs is there, when it is read.
    """
    states = _saved(folder / "whole")
    like = states[STEPS[-1]]

    def restored(where: pathlib.Path, step: int | None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Checkpointer(where, SPEC) as checkpointer:
                return checkpointer.restore(like, step=step)

    def right(found: Any) -> bool:
        said = found.step in states and (found.data, found.spec) == (
            {"next_index": 16 * found.step},
            SPEC,
        )
        return said and _same(found.state, states[found.step])

    copies = _damaged(seed, count, folder, _CHECKPOINT)
    for index, (name, where) in enumerate(copies):
        # Every third one is asked for by its number, so that no older one will do.
        step = None if index % 3 else STEPS[-1]
        yield Case(name, functools.partial(restored, where, step), right)


def log_cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """Logs of three links, of which one or two records have been damaged.

    Args:
      seed: Of the damage.
      count: How many.
      folder: An empty one, as for ``checkpoint_cases``.
    """
    base, weights = _logged(folder / "whole")
    _logged(folder / "other", key=1)

    def rebuilt(where: pathlib.Path) -> Any:
        return ChainLog(where).rebuild(base, links=LINKS)

    for name, where in _damaged(seed, count, folder, _LOG):
        yield Case(
            name,
            functools.partial(rebuilt, where),
            functools.partial(_same, weights),
        )


def _saved(folder: pathlib.Path) -> dict[int, Any]:
    """A run's checkpoints, and what they hold by step."""
    draw, states = np.random.default_rng(0), {}
    with Checkpointer(folder, SPEC) as checkpointer:
        for step in STEPS:
            numbers = draw.normal(size=(7, 5)).astype(np.float32)
            states[step] = {
                "kernel": jnp.asarray(numbers),
                "half": jnp.asarray(numbers[:3], jnp.bfloat16),
                "codes": jnp.asarray(numbers[0], jnp.int4),
                "tokens": np.array(5_000_000_000 + step),
                "count": jnp.asarray(step),
            }
            data = {"next_index": 16 * step}
            checkpointer.save(step, states[step], data=data)
    return states


def _logged(folder: pathlib.Path, key: int = 0) -> tuple[Any, Any]:
    """A log of a chain, the weights it began with and those it ended with."""
    base = {"kernel": jnp.arange(42.0).reshape(7, 6) / 42, "bias": jnp.ones(6)}
    log, weights = ChainLog(folder), base
    factors, chain = rl.init_adapter(base, SPEC, key=key)
    for link in range(LINKS):
        factors = jax.tree.map(lambda f, add=0.1 * (link + 1): f + add, factors)
        weights, factors, chain = log.next_link(weights, factors, chain, SPEC)
    return base, weights


def _same(found: Any, want: Any) -> bool:
    """Whether two trees are alike, bit by bit."""
    if jax.tree.structure(found) != jax.tree.structure(want):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    return all(
        (a.dtype, a.shape, np.asarray(a).tobytes())
        == (b.dtype, b.shape, np.asarray(b).tobytes())
        for a, b in pairs
    )


def _damaged(
    seed: int, count: int, folder: pathlib.Path, kinds: tuple[Damage, ...]
) -> Iterator[tuple[str, pathlib.Path]]:
    """A name of the damage and a damaged copy, in turn; the one before is taken away."""
    draw, where = random.Random(seed), folder / "case"
    for index in range(count):
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(folder / "whole", where)
        # Every kind in turn, and every fourth time a second one, drawn.
        done = [kinds[index % len(kinds)](draw, where)]
        if index % 4 == 3:
            done.append(draw.choice(kinds)(draw, where))
        yield f"{index}: {'; '.join(done)}", where


def _file(draw: random.Random, where: pathlib.Path) -> pathlib.Path:
    """A file of the newest checkpoint, often its meta, or of any; a record of a log."""
    files = [path for path in where.rglob("*") if path.is_file()]
    # By size, as orbax draws the names of some.
    files.sort(key=lambda path: (path.parent, path.stat().st_size))
    newest = [path for path in files if f"{STEPS[-1]}" in path.parts]
    meta = [path for path in newest if "meta" in path.parts]
    return draw.choice(draw.choice([meta or files, newest or files, files]))


def _steps(where: pathlib.Path) -> list[str]:
    """The checkpoints that are there, of which one damage leaves two."""
    return [str(step) for step in STEPS if (where / str(step)).is_dir()]


def _bytes(change: Callable[[random.Random, bytearray], Any]) -> Damage:
    """Damage that is done to the bytes of one file."""

    def damage(draw: random.Random, where: pathlib.Path) -> str:
        path = _file(draw, where)
        raw = bytearray(path.read_bytes())
        if raw:
            change(draw, raw)
        path.write_bytes(raw)
        return f"{change.__name__.strip('_')} {path.relative_to(where)}"

    return damage


def _flip_a_bit(draw: random.Random, raw: bytearray) -> None:
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def _flip_some(draw: random.Random, raw: bytearray) -> None:
    for _ in range(draw.randint(2, 9)):
        _flip_a_bit(draw, raw)


def _cut(draw: random.Random, raw: bytearray) -> None:
    del raw[draw.randrange(len(raw)) :]


def _empty(draw: random.Random, raw: bytearray) -> None:
    raw.clear()


def _zero_a_block(draw: random.Random, raw: bytearray) -> None:
    start = draw.randrange(len(raw))
    raw[start : start + 64] = bytes(len(raw[start : start + 64]))


def _another_digit(draw: random.Random, raw: bytearray) -> None:
    digits = [at for at, byte in enumerate(raw) if chr(byte).isdigit()]
    if digits:
        raw[draw.choice(digits)] = ord(draw.choice("0123456789"))


def _append(draw: random.Random, raw: bytearray) -> None:
    raw.extend(draw.randbytes(draw.randint(1, 64)))


def _repeat(draw: random.Random, raw: bytearray) -> None:
    raw.extend(bytes(raw))


def _remove(draw: random.Random, where: pathlib.Path) -> str:
    path = _file(draw, where)
    path.unlink()
    return f"remove {path.relative_to(where)}"


def _folder_for_a_file(draw: random.Random, where: pathlib.Path) -> str:
    path = _file(draw, where)
    path.unlink()
    path.mkdir()
    return f"folder in place of {path.relative_to(where)}"


def _swap(draw: random.Random, where: pathlib.Path) -> str:
    one, two = _file(draw, where), _file(draw, where)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"swap {one.relative_to(where)} and {two.relative_to(where)}"


def _copy_over(draw: random.Random, where: pathlib.Path) -> str:
    one, two = _file(draw, where), _file(draw, where)
    two.write_bytes(one.read_bytes())
    return f"copy {one.relative_to(where)} over {two.relative_to(where)}"


def _part_of_another_step(draw: random.Random, where: pathlib.Path) -> str:
    """Its meta, its arrays, or one file of them, in the place of the newest one's."""
    older, newest = where / draw.choice(_steps(where)[:-1]), where / str(STEPS[-1])
    parts = sorted(p for p in older.rglob("*") if p.parent == older or p.is_file())
    there = draw.choice(parts)
    here = newest / there.relative_to(older)
    if there.is_dir():
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(there, here)
    else:
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(there, here)
    return f"{there.relative_to(where)} in place of the newest one's"


def _rename_a_step(draw: random.Random, where: pathlib.Path) -> str:
    step = draw.choice(_steps(where))
    name = draw.choice([f"{step}1", "40", f"0{step}", "-1", "99999999999999999999"])
    if not (where / name).exists():
        (where / step).rename(where / name)
    return f"rename {step} to {name}"


def _copy_a_step(draw: random.Random, where: pathlib.Path) -> str:
    step = draw.choice(_steps(where))
    name = draw.choice(["40", "25", f"0{step}", f"copy_{step}", f"{step}.bak", "5"])
    shutil.copytree(where / step, where / name, dirs_exist_ok=True)
    return f"copy {step} to {name}"


def _half_a_step(draw: random.Random, where: pathlib.Path) -> str:
    """A folder of the newest checkpoint that is gone."""
    newest = where / _steps(where)[-1]
    folders = sorted(path for path in (newest, *newest.rglob("*")) if path.is_dir())
    gone = draw.choice(folders)
    shutil.rmtree(gone)
    return f"remove {gone.relative_to(where)}"


def _record_of_another_log(draw: random.Random, where: pathlib.Path) -> str:
    record = draw.choice(sorted((where.parent / "other").iterdir()))
    shutil.rmtree(where / record.name, ignore_errors=True)
    shutil.copy(record, where / record.name)
    return f"{record.name} of another log"


def _rename_a_record(draw: random.Random, where: pathlib.Path) -> str:
    record = _file(draw, where)
    name = draw.choice(["link-00000003", "link-00000000", "link-3", "link-00000001.bak"])
    record.replace(where / name)
    return f"rename {record.name} to {name}"


_FILES: tuple[Damage, ...] = (
    *map(
        _bytes,
        (
            _flip_a_bit,
            _flip_some,
            _cut,
            _empty,
            _zero_a_block,
            _another_digit,
            _append,
            _repeat,
        ),
    ),
    _remove,
    _folder_for_a_file,
    _swap,
    _copy_over,
)
_CHECKPOINT = (
    *_FILES,
    _part_of_another_step,
    _rename_a_step,
    _copy_a_step,
    _half_a_step,
)
_LOG = (*_FILES, _record_of_another_log, _rename_a_record)
