"""Folders' contents, atomic writes, write errors as messages, the paths of a run, and the code that it runs."""

import ast
import contextlib
import errno
import glob
import importlib.util
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from util import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

STALE_AFTER = 3600  # seconds after which an unfinished file belongs to a process that was killed
# files that every script imports, directly or not: no part of the code that a run keeps
NOT_KEPT = ("util.py", "voc.py")
PLOTS = ("curves", "iou", "confusion", "predictions", "augmentation")


def walk(folder, recursive=True, seen=()):
    """List the files below a folder, and what is skipped: hidden entries and, unless ``recursive``, subfolders.

    Both are lists of Paths, sorted by name within a folder. Links are followed, but no folder is entered twice. Raises
    a UserError if a folder cannot be read.
    """
    seen = seen or set()
    seen.add(os.path.realpath(folder))
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}): change its permissions") from None
    found, skipped = [], []
    for entry in entries:
        path = Path(folder, entry.name)
        if entry.name.startswith("."):
            skipped.append(path)
        elif not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):  # isdir: links may lead nowhere
            found.append(path)
        elif recursive and os.path.realpath(path) not in seen:
            below = walk(path, recursive, seen)
            found += below[0]
            skipped += below[1]
        else:
            skipped.append(path)
    return found, skipped


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


def make_folder(folder):
    """Create a folder, with its parents, unless it exists; UserError now rather than later if it cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


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
            _replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def _replace(source, target):
    """``os.replace``, tried again for some seconds: on Windows it fails while another program has the target open."""
    for seconds in (0.1, 0.4, 1, 2):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    return os.replace(source, target)


def _delete_stale(path):
    for unfinished in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.*.unfinished"):
        with contextlib.suppress(OSError):  # such as another process having just finished or deleted it
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


def read_code(script):
    """The text of a script and of the files that it imports, directly or through others.

    These are files and packages in the script's folder, but for NOT_KEPT. Returns a dict from the path below that
    folder to the text; the script comes first.
    """
    script = script.resolve()  # Python imports from beside the file that a link leads to
    folder, texts, paths = script.parent, {}, [script]
    while paths:
        path = paths.pop(0)
        name = path.relative_to(folder).as_posix()
        if name in texts or name in NOT_KEPT or name.startswith("seg/") or not path.is_file():
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # such as a file that is being edited
            texts[name] = importlib.util.decode_source(path.read_bytes())
            paths += _imported(ast.parse(texts[name]), path, folder)
    return texts


def _imported(tree, path, folder):
    """The files that the module at ``path``, below ``folder``, may import from there: a list of Paths."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [folder.joinpath(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parents[node.level - 1] if node.level else folder
            package = package.joinpath(*(node.module or "").split("."))
            modules += [package, *(package / alias.name for alias in node.names)]
    found = [module.with_name(f"{module.name}.py") for module in modules]
    found += [package / "__init__.py" for module in modules for package in (module, *module.parents)]
    return [file for file in found if file.is_relative_to(folder) and file != folder / "__init__.py"]


class RunFiles:
    """The paths of a run's files below the output folder; raises a UserError if a folder cannot be written.

    ``best`` and ``last`` are checkpoints, ``history`` the CSV and ``metrics`` the JSON in ``results``, ``report`` the
    HTML report in ``plots``. A folder holds one run of an experiment.
    """

    def __init__(self, out, experiment, seed):
        self.experiment, self.plots, self.results = experiment, out / "plots", out / "results"
        self.best, self.last = out / f"best_{experiment}.pt", out / f"last_{experiment}.pt"
        self.history = self.results / f"{experiment}_seed{seed}.csv"
        self.metrics = self.history.with_suffix(".json")
        self.report = self.plots / f"{experiment}_report.html"
        for folder in (self.plots, self.results, out):
            make_folder(folder)

    def plot(self, name):
        return self.plots / f"{self.experiment}_{name}.png"

    def existing(self):
        """The files that runs of this experiment, with any seed, have left: a list of Paths."""
        plots = [self.plot(name) for name in PLOTS]
        pattern = re.escape(self.experiment) + r"_seed\d+\.(csv|json)"
        results = [path for path in sorted(self.results.iterdir()) if re.fullmatch(pattern, path.name)]
        return [path for path in (self.best, self.last, *plots, self.report, *results) if path.exists()]

    def delete(self):
        """Delete what earlier runs of this experiment have left."""
        for path in self.existing():
            with writing(path):
                path.unlink()

    @contextlib.contextmanager
    def locked(self):
        """Keep other runs of this experiment out of the folder during the block; UserError if one is in it.

        The lock is the system's own, on an empty file: it ends with the process, even if that is killed.
        """
        path = self.best.with_name(f".{self.experiment}.lock")
        with writing(path):
            file = open(path, "w")
        with file:
            try:
                if fcntl is None:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                problem = f"another run of {self.experiment} is writing to this folder"
                raise UserError(f"{self.best.parent}: {problem}: wait, or choose another --out") from None
            except OSError:  # a file system without locks
                pass
            yield
