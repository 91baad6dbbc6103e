"""Atomic writes, and write errors as messages."""

import contextlib
import errno
import glob
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from util import UserError

ROOT = Path(__file__).resolve().parent.parent  # the project's folder
STALE_AFTER = 3600  # seconds after which an unfinished file belongs to a process that was killed


def command_line(parts):
    """The parts of a command, quoted for the system's shell, as one line."""
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)([str(part) for part in parts])


@contextlib.contextmanager
def writing(path):
    """Turn a failure to write ``path`` into a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        advice = "free some space" if full else "choose a folder that can be written"
        if isinstance(error, PermissionError) and os.name == "nt":
            advice = f"close the program that has it open, or {advice}"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): {advice}") from None


def make_folder(path):
    """Create a folder, with those above it, unless it exists; UserError if that fails."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file, ``<path>.<process id>.unfinished``, that replaces ``path`` when the block ends.

    If writing fails, it is deleted, and a UserError is raised. A later write deletes what a killed process has left.
    """
    unfinished = Path(f"{path}.{os.getpid()}.unfinished")
    with writing(path):
        for stale in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.*.unfinished"):
            with contextlib.suppress(OSError):  # such as another process having just finished
                if time.time() - stale.stat().st_mtime > STALE_AFTER:
                    stale.unlink()
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def write(path, content):
    """Write bytes to ``path``, see ``atomic_write``."""
    with atomic_write(path) as file:
        file.write(content)


def _replace(source, target):
    """``os.replace``, tried again for some seconds: on Windows it fails while another program has the target open."""
    for seconds in (0.1, 0.4, 1, 2):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    return os.replace(source, target)


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
