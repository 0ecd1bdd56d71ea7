"""A folder that is written beside its name and gets it when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill that gets its name when all went well, and else is gone.

    What a killed run left half-written of the same name is cleared away first.

    Raises:
      FileExistsError: If the name is taken: nothing is written over.
      BlockingIOError: If another run is writing a folder of that name.
      OSError: If the disk takes no more.
    """
    partial = folder.with_name(_hidden(folder.name))
    _check_free(folder)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, partial):
        try:
            # What a killed run left. The folder itself stays: it is what is locked.
            for left in partial.iterdir():
                _remove(left)
            yield partial
            _flush(partial)
            # Again: a rename takes the place of an empty folder without a word on POSIX.
            _check_free(folder)
            partial.rename(folder)
            _sync(folder.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno and not error.filename:
                raise OSError(
                    error.errno,
                    f"{folder} could not be written and nothing of it was kept "
                    f"({error.strerror})",
                ) from error
            raise


def _hidden(name: str) -> str:
    """Short enough for every name that the disk takes, and of that name alone."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f".{name[:40]}.{digest}.partial"


def _check_free(folder: pathlib.Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is left as it is; name another")


@contextlib.contextmanager
def _locked(folder: pathlib.Path, partial: pathlib.Path) -> Iterator[None]:
    """Nobody else's while it lasts; the lock of a killed run is gone with it."""
    partial.mkdir(exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have renamed it between the two lines above.
        if not partial.exists() or partial.stat().st_ino != os.fstat(held).st_ino:
            raise BlockingIOError
        yield
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{folder} is being written by another run; name another"
        ) from error
    finally:
        os.close(held)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(folder: pathlib.Path) -> None:
    """Every file and folder inside is on the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: pathlib.Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies files and folders, but for hidden folders; links are followed."""
    for path in sorted(source.iterdir()):
        if not path.is_dir():
            shutil.copyfile(path, target / path.name)
        elif not path.name.startswith("."):
            (target / path.name).mkdir()
            copy_folder(path, target / path.name)
