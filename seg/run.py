"""A run on disk: its folder, lock, metadata, history, results and checkpoints; written here and read here."""

import contextlib
import csv
import glob
import json
import math

import numpy as np

from seg import checkpoint, distributed, files, provenance
from util import UserError, reason

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

PLOTS = ("curves", "iou", "confusion", "predictions", "augmentation")
ADVICE = "resume with the original, or start again with --overwrite"
TRAINING_STATE = ("history", "criterion", "optimizer", "scheduler")  # what last_*.pt holds and best_*.pt does not


class Run:
    """The files of a run below the output folder ``out``, which holds one run of an experiment.

    ``fit`` opens a run, records each epoch, and writes the results; everything else reads it.

    Attributes:
        name: the experiment, the stem of its files' names. seed: an int.
        best, last, csv, json, report: the Paths of checkpoints, history (a row per epoch), metrics and HTML report.
        metadata: what checkpoints and the JSON hold about the run, see ``provenance.metadata``.
        history: list of dicts, one per epoch, see ``report.history_row``. metrics: the content of the JSON, a dict.
    """

    def __init__(self, out, name, seed):
        self.out, self.name, self.seed, self.history = out, name, seed, []
        self.plots, self.results = out / "plots", out / "results"
        self.best, self.last = out / f"best_{name}.pt", out / f"last_{name}.pt"
        self.csv, self.json = (self.results / f"{name}_seed{seed}{suffix}" for suffix in (".csv", ".json"))
        self.report = self.plots / f"{name}_report.html"

    @classmethod
    def read(cls, path):
        """The finished run whose metrics are in ``path``, a JSON file; UserError if it was not written by a run."""
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            run = cls(path.parents[1], metrics["experiment"], metrics["seed"])
            with open(run.csv, newline="", encoding="utf-8") as file:
                run.history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            metrics["epochs"], metrics["defaults"], metrics["val"]["miou"], metrics["flags"]["limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: was not written by a run of this version ({error!r})") from None
        metrics["code"] = provenance.versions(metrics.get("code"))
        metrics.setdefault("title", metrics.get("idea", ""))  # its name in an earlier version
        run.metrics = metrics
        return run

    def plot(self, name):
        return self.plots / f"{self.name}_{name}.png"

    @property
    def splits(self):
        """The splits with results; the plots of a comparison are of the last."""
        return ("val",) if self.metrics["test"] is None else ("val", "test")

    @property
    def classes(self):
        return tuple(self.metrics["val"]["iou"])

    def score(self, split, name):
        """A metric of a split as a float, NaN if there is none."""
        value = (self.metrics[split] or {}).get(name)
        return math.nan if value is None else value

    def class_ious(self, split):
        """The IoU of each class on a split: float array [C], NaN for a class that does not occur."""
        return np.array(list(self.metrics[split]["iou"].values()), float)

    def code_change(self):
        """How the code of this run differs from that in the project's folder today, as text; None if it does not."""
        for version in self.metrics["code"]:
            before = {name: text for name, text in version["files"].items() if (files.ROOT / name).exists()}
            now = {name: provenance.read_text(files.ROOT / name) for name in before}
            if change := provenance.code_change(before, now):
                return change
        return None

    @property
    def best_row(self):
        """The row of the epoch with the highest mean IoU on val; of several, the one with the lowest val loss."""
        return max(self.history, key=lambda row: (row["val_miou"], -row["val_loss"]))

    @contextlib.contextmanager
    def open(self, args, parts, loaders):
        """Lock the run during the block; yield whether it is to be resumed. ``parts`` are as for ``record``.

        The main process alone looks at the folder and decides, before anything is read or written. Raises a UserError
        if the folder cannot be written, or if another run or its files are in the way.
        """
        with contextlib.ExitStack() as stack:
            resuming, problem = False, None
            if distributed.is_main():
                try:
                    for folder in (self.plots, self.results):
                        files.make_folder(folder)
                    stack.enter_context(self._locked())
                    resuming = args.resume and self.last.exists()
                    if not (resuming or args.overwrite):
                        self._check_new()
                except UserError as error:
                    problem = str(error)
            resuming, problem = distributed.broadcast_object((resuming, problem), args.device)
            if problem:
                raise UserError(problem) if distributed.is_main() else SystemExit(2)
            self.metadata = provenance.metadata(args, self.name, parts, loaders)
            yield resuming

    def restore(self, parts, scheduled):
        """Continue the run: restore the state of ``parts``, see ``record``, and the history.

        Returns a list of messages about what has changed since. With ``scheduled``, the learning rates depend on the
        number of epochs, which then has to be the same. Raises a UserError if the checkpoints are damaged or belong to
        another run than ``metadata`` describes.
        """
        state = checkpoint.read(self.last, "history")
        messages = self._check_same_run(state, scheduled)
        try:
            for name, part in parts.items():
                if hasattr(part, "load_state_dict"):
                    part.load_state_dict(state[name])
        except Exception as error:  # a missing or wrong entry raises one of many types
            problem = f"does not fit the model or optimizer ({reason(error)})"
            raise UserError(f"{self.last}: {problem}: {ADVICE}") from None
        self.history = list(state["history"])
        self._complete(state)
        return messages

    def _complete(self, state):
        """Write what a kill after writing last, whose content is ``state``, has prevented."""
        if not distributed.is_main():
            return
        epoch = checkpoint.read(self.best, "epoch")["epoch"] if self.best.exists() else None
        best = self.best_row["epoch"]
        if epoch != best and best != state["epoch"]:
            found = "is missing" if epoch is None else f"is of epoch {epoch}, not of the best, {best}"
            raise UserError(f"{self.best}: {found}, so the run cannot be continued: start again with --overwrite")
        if epoch != best:
            self._save_best(state)
        self._write_csv()

    def _check_same_run(self, state, scheduled):
        """Raise a UserError that names the first thing in which ``state`` is of another run; return messages."""
        now, flags = self.metadata, self.metadata["flags"]
        names = ("seed", "dataset", "classes", "size", "mean", "std", "optimizer_class", "scheduler_class")
        known = now["defaults"] | state["flags"]  # a flag that a script has got since has had its default
        compared_flags = [name for name in ("limit", *now["defaults"]) if scheduled or name != "epochs"]
        compared = [(name, state, now) for name in names] + [(name, known, flags) for name in compared_flags]
        for name, old, new in compared:
            if name in old and old[name] != new[name]:  # an earlier version kept fewer
                name, values = name.removesuffix("_class"), f"{old[name]}, not {new[name]}"
                raise UserError(f"{self.last}: its run had {name} {values}: {ADVICE}")
        if state["data_sha256"] != now["data_sha256"]:
            raise UserError(f"{self.last}: its run had other image ids or masks, on train, val or test: {ADVICE}")
        done = len(state["history"])
        if done > flags["epochs"]:
            raise UserError(f"{self.last}: its run has {done} epochs, more than {flags['epochs']}: raise --epochs")
        versions, code = provenance.versions(state["code"]), self.metadata["code"][0]
        change = provenance.code_change(versions[-1]["files"], code["files"])
        self.metadata["code"] = [*versions, code | {"epoch": done + 1}] if change else versions
        kept = "with the state of its optimizer, scheduler and criterion, such as learning rates"
        return [f"{change} since epoch {done}: the run goes on with it, but {kept}"] if change else []

    def record(self, row, parts):
        """Add an epoch's row to the history, and write its checkpoints and the CSV: last first, then best.

        So, whatever a kill leaves can be completed from last. ``row`` is from ``report.history_row``, and ``parts`` a
        dict of model, criterion, optimizer and scheduler.
        """
        history = [*self.history, row]
        if distributed.is_main():
            state = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
            state = self.metadata | dict.fromkeys(parts) | checkpoint.plain(state)
            state |= {"epoch": row["epoch"], "val_miou": row["val_miou"], "history": history}
            checkpoint.save(self.last, state)
        self.history = history  # now that the epoch is kept
        if distributed.is_main():
            if self.best_row is row:
                self._save_best(state)
            self._write_csv()

    def _save_best(self, state):
        checkpoint.save(self.best, {key: value for key, value in state.items() if key not in TRAINING_STATE})

    def _write_csv(self):
        """Write the CSV, a row per epoch. It holds no times: the same seed gives the same file."""
        left_out = ("batch_learning_rates", "seconds")
        rows = [{name: value for name, value in row.items() if name not in left_out} for row in self.history]
        lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
        files.write(self.csv, "".join(f"{line}\n" for line in lines).encode())

    def finish(self, scores):
        """Write the JSON. ``scores`` maps val and, if there is one, test to the Scores of the best epoch."""
        flags = self.metadata["flags"]
        for_loading = ("mean", "std", "module", "class", "arguments")  # what only ``checkpoint.load`` needs
        self.metrics = {name: value for name, value in self.metadata.items() if name not in for_loading} | {
            "flags": {name: flags[name] for name in (*self.metadata["defaults"], "limit")},
            "epochs": len(self.history),
            "best_epoch": self.best_row["epoch"],
            "seconds": round(sum(row["seconds"] for row in self.history), 3),
            "epoch_seconds": [row["seconds"] for row in self.history],
            "val": scores["val"].as_dict(),
            "test": scores["test"].as_dict() if "test" in scores else None,
        }
        files.write(self.json, json.dumps(self.metrics, indent=2, allow_nan=False).encode() + b"\n")

    def _existing(self):
        """The files that runs of this experiment, with any seed, have left: a list of Paths."""
        results = sorted(self.results.glob(f"{glob.escape(self.name)}_seed[0-9]*"))
        return [path for path in (self.best, self.last, *map(self.plot, PLOTS), self.report, *results) if path.exists()]

    def _check_new(self):
        """Raise a UserError if the files of an earlier run are in the way."""
        if existing := self._existing():
            advice = "continue it with --resume, " if self.last.exists() else ""
            advice += "replace it with --overwrite, or choose another --out"
            raise UserError(f"{existing[0]}: is from an earlier run: {advice}")

    def delete(self):
        """Delete what earlier runs of this experiment have left."""
        for path in self._existing() if distributed.is_main() else ():
            with files.writing(path):
                path.unlink()

    @contextlib.contextmanager
    def _locked(self):
        """Keep other runs of this experiment out of the folder during the block; UserError if one is in it.

        The lock is the system's own, on an empty file: it ends with the process, even if that is killed.
        """
        path = self.out / f".{self.name}.lock"
        with files.writing(path):
            file = open(path, "w")
        with file:
            try:
                if fcntl is None:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                problem = f"another run of {self.name} is writing to this folder"
                raise UserError(f"{self.out}: {problem}: wait, or choose another --out") from None
            except OSError:  # a file system without locks
                pass
            yield
