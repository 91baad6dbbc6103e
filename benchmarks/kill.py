"""Kill training runs at random moments and resume them: the result must equal that of an uninterrupted run.

    python benchmarks/kill.py --data data/VOCdevkit/Toy                  60 kills of train.py
    python benchmarks/kill.py --data data/VOCdevkit/Toy --kills 10 --processes 2

A run of a few epochs is killed with SIGKILL, together with all processes it has started, and started again with
--resume, until it ends by itself. Metrics and weights are compared byte for byte with those of a run that was never
killed. After each kill, every checkpoint must be readable; a file that was still being written, ``*.unfinished``, does
not count. No kill comes in the first third of a run, which imports PyTorch. Exit code 1 on any failure. Needs Linux.
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

from seg import cli


def run(args, out, timeout=None):
    """Start or resume a run and return its seconds, or None if it was killed after ``timeout`` seconds."""
    start = time.monotonic()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    flags = f"--epochs 6 --limit 4 --batch-size 2 --device cpu --resume --data {args.data} --out {out}"
    command = [sys.executable, *(torchrun if args.processes > 1 else []), str(ROOT / "train.py"), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: sums depend on the number of threads
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in with_descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    return time.monotonic() - start


def with_descendants(pid):
    """The ids of a process and of all processes below it."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(descendant for child in children for descendant in with_descendants(int(child)))]


def read_results(out):
    """The metrics and weights of a finished run as a dict from name to value, without the time it took."""
    metrics = json.loads((out / "results" / "train_seed0.json").read_text())
    del metrics["seconds"], metrics["epoch_seconds"]
    results = {"JSON": metrics, "CSV": (out / "results" / "train_seed0.csv").read_bytes()}
    for kind in ("best", "last"):
        state = torch.load(out / f"{kind}_train.pt", weights_only=True)
        results |= {f"{kind} {name}": value.numpy().tobytes() for name, value in state["model"].items()}
    for parameter, values in state["optimizer"]["state"].items():
        results |= {f"optimizer {parameter} {name}": value.numpy().tobytes() for name, value in values.items()}
    return results


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="data/VOCdevkit/Toy")
    parser.add_argument("--kills", type=cli.integer(1), default=60)
    parser.add_argument("--processes", type=cli.integer(1), default=1)
    args = parser.parse_args()
    num_kills, num_runs, num_resumed, mismatches = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(args, Path(folder) / "uninterrupted")
        expected = read_results(Path(folder) / "uninterrupted")
        while num_kills < args.kills:
            num_runs += 1
            out = Path(folder) / str(num_runs)
            while not run(args, out, random.uniform(seconds / 3, seconds) if num_kills < args.kills else None):
                num_kills += 1
                num_resumed += (out / "last_train.pt").exists()
                for path in out.glob("*.pt"):
                    torch.load(path, weights_only=True)  # raises an error if the file is damaged
            results = read_results(out)
            mismatches += [f"run {num_runs}: {name}" for name in expected if results.get(name) != expected[name]]
    print(f"{num_kills} kills of {args.processes} process(es) in {num_runs} runs, {num_resumed} resumed:")
    print(f"all checkpoints readable, {len(mismatches)} mismatches in {num_runs * len(expected)} comparisons")
    sys.exit("\n".join(mismatches) or 0)


if __name__ == "__main__":
    cli.run(main)
