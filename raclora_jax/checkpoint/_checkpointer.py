"""Save and restore of a run over orbax."""

from __future__ import annotations

import json
import os
import pathlib
import types
import uuid
import warnings
from collections.abc import Iterable
from typing import Any

import jax

from raclora_jax._core import checks, paths
from raclora_jax._core.digest import digests
from raclora_jax._core.disk import flush_all
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaves, PyTree
from raclora_jax._extras import extra
from raclora_jax.checkpoint._everyone import agreed, attempt, everyone, one_line
from raclora_jax.checkpoint._leaves import is_empty, loaded, stored, target, zeros
from raclora_jax.checkpoint._meta import check_format, opened, sealed
from raclora_jax.checkpoint._position import as_text, own
from raclora_jax.checkpoint._state import (
    Restored,
    check_table,
    saved_leaves,
    table,
    with_sketches,
)

_ASIDE = "damaged"


class Checkpointer:
    """Keeps the newest checkpoints of one run in a directory.

    A checkpoint holds a tree of arrays (params and optimizer state, in any form), the
    position in the data, the spec, a digest of every array's bits, and one of all that.
    It is written beside and renamed, so that a killed process leaves the last one whole;
    what is read is compared with the digests, so that a damaged one is not trained on.
    Cached sketches are left out: the first update draws them again, with the same bits.

    Where a run has several processes, each calls every method, and the directory is one
    that all of them see.

    Args:
      directory: Where the checkpoints are; made if it is not there.
      spec: The spec of the run.
      keep: How many checkpoints stay, the newest.

    Raises:
      ModuleNotFoundError: If orbax is not installed.
      ValueError: If ``keep`` is below 1, or the directory's name holds one of
        ``[]*?\\``, which orbax takes for a pattern.
      TypeError: If ``keep`` is no int.
      OSError: If the directory cannot be made.

    Example:
      >>> import tempfile, jax.numpy as jnp, raclora_jax as rl
      >>> params, spec = {"kernel": jnp.ones((6, 4))}, rl.Spec(2)
      >>> tx = rl.raclora(1e-3, spec, key=0)
      >>> state = params, tx.init(params)
      >>> with Checkpointer(tempfile.mkdtemp(), spec) as checkpointer:
      ...     checkpointer.save(40, state, data={"next_index": 41})
      ...     step, state, data, _ = checkpointer.restore(state)
      >>> step, data
      (40, {'next_index': 41})
    """

    def __init__(
        self, directory: str | os.PathLike[str], spec: Spec | int, *, keep: int = 3
    ) -> None:
        self._spec = as_spec(spec)
        self._keep = checks.count("keep", keep)
        self._orbax, epath = _orbax()
        where = os.fsdecode(directory)
        self._local = "://" not in where
        self._directory = epath.Path(os.path.abspath(where) if self._local else where)
        _check_name(self._directory.as_posix())
        self._directory.mkdir(parents=True, exist_ok=True)
        self._saving: int | None = None
        self._manager: Any = None

    def save(self, step: int, state: PyTree, *, data: Any = None) -> None:
        """Copies the state to the host and writes it while the run goes on.

        Args:
          step: A number above those saved before.
          state: Tree of arrays, such as ``(params, opt_state)``; it may be donated to
            the next step. Python numbers come back as arrays, and so do numpy's, except
            where they have 64 bits that JAX would cut: those come back in numpy.
          data: Position in the data: bytes or what JSON can hold, such as a grain
            iterator's ``get_state()``. Each process may give its own.

        Raises:
          ValueError: If there is a checkpoint of this step or a later one, a number of
            Python's does not fit its array, or processes hold different numbers.
          TypeError: If JSON cannot hold the data, or a leaf is no array.
          OSError: If the directory cannot be written to, or the save before this one
            failed. The checkpoints that are whole stay as they are.
        """
        step = checks.count("step", step, least=0)
        self.wait()
        last = self.latest()
        if last is not None and step <= last:
            raise ValueError(
                f"step {step} does not come after step {last}, the latest in "
                f"{self._directory}; restore that one and go on from it, or save to "
                "another directory"
            )
        leaves, _ = saved_leaves(state)
        # Before stored, which makes bytes of small dtypes: the table has the run's own.
        described = table(leaves)
        leaves = {path: stored(path, leaf) for path, leaf in leaves.items()}
        meta = sealed(
            step,
            spec=self._spec.to_json(),
            leaves=described,
            # Of what is written: a restored leaf has the same bits, so the same digest.
            digests=agreed(digests(leaves)),
            data=everyone(as_text(data)),
        )
        _, reason = attempt(self._probe)
        if reason:
            raise self._failed(step, reason)
        args = self._orbax.args
        full = {path: leaf for path, leaf in leaves.items() if not is_empty(leaf)}
        try:
            self._manager = self._manager or self._begun()
            self._saving = step
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(full), meta=args.JsonSave(meta)
                ),
                # Without it orbax may decline a step, and only its result says so.
                force=True,
            )
        except Exception as error:
            self._reload()
            raise self._failed(step, one_line(error)) from error

    def restore(self, like: PyTree, *, step: int | None = None) -> Restored:
        """Reads the newest whole checkpoint onto the devices that ``like`` names.

        One that is cut short, lacks files, holds other bits than were saved or has been
        renamed is passed over for the one before, and moved to ``damaged/`` in the
        directory; a warning says so in one line.

        Args:
          like: Tree of arrays or abstract arrays with the structure of what was saved.
            Their shardings say where it goes, on any mesh and device count; leaves
            without one go to the default device. ``abstract_state`` makes it.
          step: A certain checkpoint and no other.

        Returns:
          Step, state, position in the data, and the spec it was saved with.

        Raises:
          FileNotFoundError: If there is no checkpoint, or none of that step.
          ValueError: If the run's spec cannot go on with it, its leaves have other
            paths, shapes or dtypes, or no checkpoint is whole.
        """
        self.wait()
        steps = self.steps()
        step = step if step is None else checks.count("step", step, least=0)
        if step is not None and step not in steps:
            said = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self._directory}; there are: {said}"
            )
        if not steps:
            raise FileNotFoundError(
                f"no checkpoint in {self._directory}; start from tx.init(params)"
            )
        passed: dict[int, str] = {}
        for one in steps[::-1] if step is None else [step]:
            found, reason = self._read(one, like)
            if found is not None:
                # Not before one is whole: where none is, the fault may be the reader's.
                self._pass_over(passed, one)
                return found
            passed[one] = reason
        said = "; ".join(f"step {one}: {reason}" for one, reason in passed.items())
        raise ValueError(
            f"no whole checkpoint in {self._directory}, nothing was changed there: {said}"
        )

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first, as process 0 sees."""
        return json.loads(everyone(json.dumps(self._steps_here()))[0])

    def latest(self) -> int | None:
        """The newest of them, or None."""
        return next(iter(self.steps()[::-1]), None)

    def wait(self) -> None:
        """Waits until the last save is on disk, and sees that it can be read.

        Raises:
          OSError: If it failed. The checkpoints before it stay as they are.
        """
        # Forgotten first: what fails here is told once, and the next save may go on.
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._reload()
            raise self._failed(step, one_line(error)) from error
        if jax.process_index() == 0:
            self._read_back(step)

    def close(self) -> None:
        """Waits, then lets go of the directory.

        Raises:
          OSError: As ``wait``.
        """
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _begun(self) -> Any:
        """orbax's manager, which takes away what killed saves have left.

        That is for the process that saves: one that only reads may do so beside it.
        """
        return self._orbax.CheckpointManager(
            self._directory,
            item_names=("state", "meta"),
            options=self._orbax.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True
            ),
        )

    def _reload(self) -> None:
        if self._manager is not None:
            self._manager.reload()

    def _probe(self) -> None:
        """Refuses a directory that cannot be written to, before anything is copied."""
        if jax.process_index() == 0:
            probe = self._directory / ".probe"
            probe.write_text("")
            probe.unlink(missing_ok=True)

    def _steps_here(self) -> list[int]:
        named = self._orbax.utils.checkpoint_steps(self._directory)
        return sorted({one for one in named if self._folder(one).exists()})

    def _folder(self, step: int) -> Any:
        return self._directory / str(step)

    def _failed(self, step: int, reason: str) -> OSError:
        """What a failed save is; it may have failed in this process alone."""
        here = [one for one in self._steps_here() if one != step]
        left = f"the last is step {here[-1]}" if here else "there is no earlier one"
        return OSError(
            f"the checkpoint of step {step} was not written to {self._directory}: "
            f"{reason}; {left}"
        )

    def _read_back(self, step: int) -> None:
        """Opens every array of a save; their bits are compared when they are restored."""
        folder, handlers = self._folder(step), self._orbax.handlers
        try:
            self._meta(step)
            handlers.StandardCheckpointHandler().metadata(folder / "state")
            if self._local:
                flush_all(pathlib.Path(folder))
        except Exception as error:
            if folder.exists():
                self._move_aside([step])
            raise self._failed(
                step, f"it cannot be read back ({one_line(error)})"
            ) from error

    def _meta(self, step: int) -> dict[str, Any]:
        handler = self._orbax.handlers.JsonCheckpointHandler()
        return opened(handler.restore(self._folder(step) / "meta"), step)

    def _read(self, step: int, like: PyTree) -> tuple[Restored | None, str]:
        """What a checkpoint holds, or why it is not whole."""
        handlers, args = self._orbax.handlers, self._orbax.args
        meta, reason = attempt(lambda: self._meta(step))
        if reason or meta is None:
            return None, reason
        # From here on it is a whole checkpoint. One of another version, spec or model
        # raises: passed over, it would be moved aside.
        check_format(meta)
        saved = Spec.from_json(meta["spec"])
        self._spec.check_resumes(saved)
        leaves, treedef = saved_leaves(like)
        check_table(meta["leaves"], leaves, step)
        data = own(meta["data"], step)
        wanted = {path: target(leaf) for path, leaf in leaves.items()}
        wanted = {path: leaf for path, leaf in wanted.items() if not is_empty(leaf)}
        read, reason = attempt(
            lambda: handlers.StandardCheckpointHandler().restore(
                self._folder(step) / "state", args=args.StandardRestore(wanted)
            )
        )
        if reason or read is None:
            return None, reason
        found: Leaves = {
            path: loaded(read[path], leaf) if path in read else zeros(leaf)
            for path, leaf in leaves.items()
        }
        for path, digest in digests(found).items():
            if digest != meta["digests"][path]:
                return None, f"leaf {paths.show(path)} has other bits than were saved"
        state = with_sketches(paths.unflatten(treedef, found), like)
        return Restored(step, state, data, saved), ""

    def _pass_over(self, passed: dict[int, str], used: int) -> None:
        """Moves what is not whole out of the way of the steps that come."""
        if not passed:
            return
        if jax.process_index() == 0:
            aside = self._move_aside(passed)
            said = "; ".join(f"step {step} ({why})" for step, why in passed.items())
            warnings.warn(
                f"not whole, moved to {aside}: {said}; restored step {used} instead",
                stacklevel=3,
            )
        everyone("moved")
        self._reload()

    def _move_aside(self, steps: Iterable[int]) -> Any:
        aside = self._directory / _ASIDE
        aside.mkdir(exist_ok=True)
        for step in steps:
            # A name of its own: a step that is saved again may be damaged again.
            self._folder(step).rename(aside / f"{step}-{uuid.uuid4().hex}")
        self._reload()
        return aside


def _check_name(where: str) -> None:
    """Refuses what orbax would take for a pattern when it looks for its own files."""
    found = [mark for mark in "[]*?\\" if mark in where]
    if found:
        raise ValueError(
            f"the directory {where} has {' and '.join(found)} in its name, which orbax "
            "takes for a pattern, so that it would not find what it saved there; choose "
            "a name without"
        )


def _orbax() -> tuple[Any, Any]:
    """orbax and its paths, which only those who save a run need."""
    with extra("checkpoint"):
        import orbax.checkpoint as orbax
        from etils import epath
    return orbax, epath
