"""Stop commands at random moments and start them again: the result must equal that of an uninterrupted run.

    python benchmarks/kill.py --data data/VOCdevkit/Toy                       60 times SIGKILL for train.py
    python benchmarks/kill.py --data data/VOCdevkit/Toy --count 10 --processes 2
    python benchmarks/kill.py --data data/VOCdevkit/CamVid --signal TERM --command train_6

A command gets the signal after a random time in which its own code runs, and is started again, with --resume, until it
ends by itself. Then metrics, weights, plots and tables must be, byte for byte, those of a run without signals. After
each signal, every checkpoint must be readable; a file that was still being written, ``*.unfinished``, does not count.

SIGKILL goes to all processes that the command has started; SIGTERM and SIGINT to the command alone, with several
processes to torchrun. It must then end within 30 seconds with the signal's exit code, unless its work was done, and
without a traceback (torchrun prints one). A line per signal says what it took and what the command had printed last.
Exit code 1 on any failure. Needs Linux.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from seg import cli, signals

COMMANDS = {
    "train": "train.py --resume --epochs 6 --limit 4 --batch-size 2",
    "train_6": "train_6.py --resume --epochs 3 --limit 16 --no-pretrained",
    "compare": "compare.py --seeds 0 1 --experiments train --epochs 2 --limit 8 --batch-size 4",
    "predict": "predict.py --resume ../best_train.pt",  # and NUM_PHOTOS photos
}
NUM_PHOTOS = 33
LIMIT = 30  # seconds after which schedulers of clusters send SIGKILL


def start(args, command, out):
    """Start a command in the folder ``out`` and return its process as soon as the script's own code runs."""
    flags = COMMANDS[command].split()
    photos = sorted(map(str, Path(args.data, "JPEGImages").iterdir()))[:NUM_PHOTOS]
    flags += photos if command == "predict" else ["--data", args.data]
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {args.processes}".split()
    python = [sys.executable, *(torchrun if args.processes > 1 else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: sums depend on the number of threads
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment, "cwd": out}
    out.mkdir(exist_ok=True)
    process = subprocess.Popen([*python, ROOT / flags[0], *flags[1:], "--device", "cpu"], **options)
    while process.poll() is None and sum(map(is_running, with_descendants(process.pid))) < args.processes:
        time.sleep(0.01)
    return process


def with_descendants(pid):
    """The ids of a process and of all processes below it."""
    children = []
    with contextlib.suppress(OSError):  # one has just ended
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(descendant for child in children for descendant in with_descendants(int(child)))]


def is_running(pid):
    """Whether a process is a script that handles SIGTERM by now; torchrun's launcher is not."""
    with contextlib.suppress(OSError):
        command, status = (Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "status"))
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return caught >> signal.SIGTERM - 1 & 1 and "torch.distributed.run" not in command
    return False


def send(process, number):
    """Send a signal to a process, and SIGKILL to all below it too."""
    for pid in with_descendants(process.pid) if number == signal.SIGKILL else [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def run(args, out, expected=(), delay=None):
    """Start or resume the command in the folder ``out``, and send it the signal after ``delay`` seconds.

    Returns whether it got it, the seconds that it ran, from the signal on if it got it, its output, and its faults.
    """
    process, begin = start(args, args.command, out), time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        output, _ = process.communicate(timeout=delay)
        if process.returncode:
            sys.exit(f"{args.command} failed:\n{output}")
        return False, time.monotonic() - begin, output, []
    missing = [name for name in expected if name.endswith((".json", "_mask.png")) and not (out / name).exists()]
    is_done = len(missing) <= (args.command == "predict")  # its last photo
    begin, number = time.monotonic(), signal.Signals[f"SIG{args.signal}"]
    send(process, number)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        send(process, signal.SIGKILL)
        sys.exit(f"{args.command} ran for {LIMIT} s after the signal:\n{process.communicate()[0]}")
    faults, several = [], args.processes > 1
    if number != signal.SIGKILL:
        faults += [text for text in ("Exception ignored", *["Traceback"] * (not several)) if text in output]
        if process.returncode not in (1 if several else 128 + number, *([0, -number] if is_done else [])):
            faults.append(f"exit code {process.returncode}")  # torchrun has its own, 1
    return True, time.monotonic() - begin, output, faults


def read_results(out):
    """What a command has written, as a dict from name to value, without the time it took."""
    results = {}
    for path in out.rglob("*.*"):
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            results[name] = json.loads(path.read_text()) | {"seconds": 0, "epoch_seconds": 0}
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)["model"]  # raises an error if the file is damaged
            results[name] = {key: value.numpy().tobytes() for key, value in state.items()}
        elif path.suffix in (".csv", ".md", ".png"):
            results[name] = path.read_bytes()
    return results


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", type=Path, default="data/VOCdevkit/Toy")
    parser.add_argument("--command", choices=COMMANDS, default="train", help="default: %(default)s")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="default: %(default)s")
    parser.add_argument("--count", type=cli.integer(1), default=60, help="number of signals (default: %(default)s)")
    parser.add_argument("--processes", type=cli.integer(1), default=1, help="more than 1: under torchrun")
    args = parser.parse_args()
    args.data = str(args.data.resolve())
    taken, problems, num_runs = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.command == "predict":
            start(args, "train", folder).communicate()
        _, duration, *_ = run(args, folder / "uninterrupted")
        expected = read_results(folder / "uninterrupted")
        while len(taken) < args.count:
            num_runs += 1
            out, stopped = folder / str(num_runs), True
            while stopped:
                signals.check()
                delay = random.uniform(0, duration) if len(taken) < args.count else None
                stopped, seconds, output, faults = run(args, out, expected, delay)
                results = read_results(out)
                if stopped:
                    taken.append(seconds)
                    last = output.split("\nstopping;")[0].strip().split("\n")[-1]
                    print(f"{len(taken)}: {seconds:.1f} s, {faults or 'no fault'}, in: {last}", flush=True)
                    problems += [f"signal {len(taken)}: {text}" for text in faults]
            names = [name for name in results.keys() | expected.keys() if results.get(name) != expected.get(name)]
            problems += [f"run {num_runs}: {name} differs" for name in names]
            shutil.rmtree(out)
    print(f"{args.count} x SIG{args.signal} for {args.command} in {num_runs} runs: {len(problems)} faults in all")
    print(f"seconds until it ended: median {sorted(taken)[len(taken) // 2]:.1f}, largest {max(taken):.1f}")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    cli.run(main)
