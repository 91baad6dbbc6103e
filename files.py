"""Atomic writes of files and folders, write errors as messages, and the paths of a run."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from util import UserError

STALE_AFTER = 3600  # seconds after which an unfinished file belongs to a process that was killed


@contextlib.contextmanager
def writing(path):
    """Turn a failure to write ``path`` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free some space or choose another --out"
        ) from None


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that replaces ``path`` when the block ends, so that ``path`` is always complete.

    Until then it is ``<path>.<process id>.unfinished``. If writing fails, it is deleted, and a UserError is raised. A
    later write deletes what a killed process has left.
    """
    unfinished = Path(f"{path}.{os.getpid()}.unfinished")
    with writing(path):
        _delete_stale(path)
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def _delete_stale(path):
    for unfinished in Path(path).parent.glob(f"{Path(path).name}.*.unfinished"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or deleted it
            if time.time() - unfinished.stat().st_mtime > STALE_AFTER:
                unfinished.unlink()


@contextlib.contextmanager
def atomic_folder(folder):
    """Yield a new folder that becomes ``folder`` when the block ends; if the block fails, it is deleted."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class RunFiles:
    """The paths of a run's files below the output folder; raises a UserError if a folder cannot be written.

    ``best`` and ``last`` are checkpoints, ``history`` the CSV and ``metrics`` the JSON in ``results``.
    """

    def __init__(self, out, experiment, seed):
        self.experiment, self.plots = experiment, out / "plots"
        self.best, self.last = out / f"best_{experiment}.pt", out / f"last_{experiment}.pt"
        self.history = out / "results" / f"{experiment}_seed{seed}.csv"
        self.metrics = self.history.with_suffix(".json")
        for folder in (self.plots, self.metrics.parent, out):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()  # fails now rather than after the first epoch

    def plot(self, name):
        return self.plots / f"{self.experiment}_{name}.png"
