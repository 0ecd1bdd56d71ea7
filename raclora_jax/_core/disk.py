"""Files that are on the disk when they are said to be."""

from __future__ import annotations

import errno
import os
import pathlib
import time
import uuid

_STALE = 3600.0  # seconds after which no writer is still at a file of some megabytes


def write(path: pathlib.Path, raw: bytes) -> None:
    """Writes beside under a name of its own, flushes, renames and reads back.

    What writers that were killed have left beside is taken away.

    Raises:
      OSError: If it cannot be written, or other bytes are read than were written.
    """
    _sweep(path.parent)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.write_bytes(raw)
        # Before the rename: else a crash can leave the name on an empty file.
        flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)
    if path.read_bytes() != raw:
        raise OSError("other bytes are read back than were written")


def flush(path: pathlib.Path) -> None:
    """Has the system bring a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no call for it
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # What some network file systems say of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def flush_all(folder: pathlib.Path) -> None:
    """``flush`` of a folder, of all that is in it, and of its name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        flush(path)


def _sweep(folder: pathlib.Path) -> None:
    for path in folder.glob(".*.partial"):
        try:
            stale = time.time() - path.stat().st_mtime > _STALE
        except FileNotFoundError:
            continue
        if stale:
            path.unlink(missing_ok=True)
