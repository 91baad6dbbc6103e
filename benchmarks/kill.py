"""Kill training runs at random moments and resume them: the result must be that of a run that was never disturbed.

    python benchmarks/kill.py --data data/VOCdevkit/Toy                  60 kills of train.py
    python benchmarks/kill.py --data data/VOCdevkit/Toy --kills 10 --processes 2

A short run is killed with SIGKILL (with --processes, torchrun and all its processes at once), at moments drawn evenly
over its epochs and the writing of its files, and started again with --resume, until it ends by itself; then all its
figures and weights are compared, byte for byte, with those of the run that nobody disturbed. After each kill, every
checkpoint that lies there under its real name is read. Ends with exit code 1 where anything differs.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine
import util

EPOCHS = 6


def command(args, out):
    """The command line of a run."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    flags = f"--epochs {EPOCHS} --limit 4 --batch-size 2 --device cpu --resume --data {args.data} --out {out}"
    return [sys.executable, *(launch if args.processes > 1 else []), str(ROOT / "train.py"), *flags.split()]


def start(args, out):
    """Start a run; its sums depend on the number of threads, of which torchrun sets one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(args, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def family(process):
    """The number of a process and of all that it has started, as Linux tells it."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")).split()
    return [process, *(one for child in children for one in family(int(child)))]


def result(out):
    """All figures and weights of a finished run; what a clock has measured is left out."""
    figures = json.loads((out / "results" / "train_seed0.json").read_text())
    found = {"json": {**figures, "seconds": None}, "csv": (out / "results" / "train_seed0.csv").read_bytes()}
    for kind in ("best", "last"):
        state = torch.load(out / f"{kind}_train.pt", weights_only=True)
        found |= {f"{kind} {name}": value.numpy().tobytes() for name, value in state["model"].items()}
        for place, values in state.get("optimizer", {"state": {}})["state"].items():
            found |= {f"optimizer {place} {name}": value.numpy().tobytes() for name, value in values.items()}
    return found


def unreadable(out):
    """The checkpoints in a folder that cannot be read."""
    broken = []
    for path in out.glob("*.pt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # whatever it is, it counts
            broken.append(f"{path.name}: {error}")
    return broken


def undisturbed(args, folder):
    """Run once to the end; return the result, the seconds to the start of the first epoch and those of the whole."""
    began = time.monotonic()
    process = start(args, folder)
    first = None
    for line in process.stdout:
        if first is None and line.startswith(b"epoch"):
            first = time.monotonic() - began
    if process.wait() or first is None:
        raise util.UserError(f"{args.data}: the undisturbed run failed: try {' '.join(command(args, folder))}")
    return result(folder), first * 0.8, time.monotonic() - began


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="data/VOCdevkit/Toy")
    parser.add_argument("--kills", type=cli.integer(1), default=60)
    parser.add_argument("--processes", type=cli.integer(1), default=1)
    parser.add_argument("--minutes", type=cli.integer(1), default=30, help="stop after so long in any case")
    args = parser.parse_args()
    draw = random.Random(0)
    kills, runs, resumed, mismatches, broken = 0, 0, 0, [], []
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        expected, earliest, whole = undisturbed(args, Path(folder) / "whole")
        while kills < args.kills and time.monotonic() < deadline:
            runs += 1
            out = Path(folder) / str(runs)
            while True:
                resumed += (out / "last_train.pt").exists()
                process = start(args, out)
                try:
                    text, _ = process.communicate(timeout=draw.uniform(earliest, whole))
                except subprocess.TimeoutExpired:
                    for one in family(process.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(one, signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    broken += unreadable(out)
                    continue
                break
            if process.returncode:
                mismatches.append(f"run {runs} failed: {text.decode()[-3000:]}")
            else:
                found = result(out)
                mismatches += [f"run {runs}: {name}" for name in expected if found.get(name) != expected[name]]
    print(
        f"{kills} kills of {args.processes} process(es) in {runs} runs, {resumed} starts from a checkpoint: "
        f"{len(mismatches)} mismatches in {runs * len(expected)} comparisons, {len(broken)} unreadable checkpoints"
    )
    print("\n".join(mismatches + broken))
    sys.exit(bool(mismatches or broken or kills < args.kills))


if __name__ == "__main__":
    cli.run(main)
