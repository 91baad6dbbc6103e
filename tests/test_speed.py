"""The benchmarks of speed: which code they run, what they count, and that no part of gpu.sh stops the next."""

import importlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from torch.autograd import DeviceType


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed")


def test_before_is_the_code_of_the_other_checkout(tiny, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(ROOT / "seg", before / "seg")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, before)
    with open(before / "seg" / "engine.py", "a") as file:
        file.write("\ndef train_epoch(*args):\n    print('an epoch of before', flush=True)\n")
    flags = f"--data {tiny} --device cpu --limit 2 --rounds 1 --workers 0 --before {before}"
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "speed.py", *flags.split()], stdout=subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    assert lines.count("an epoch of before") == 3  # the first, a round, the profile
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "---" not in line]
    headings = "common loop", "common loop / after", "before", "before / after", "after"
    assert lines[0].startswith("cpu, 1 thread") and rows[0] == ["experiment", "rounds", *headings]
    assert [row[:2] for row in rows[3:]] == [["train", "0 workers"], ["train", "before"], ["train", "after"]]


def test_a_row_has_the_faster_common_loop_and_the_medians_and_ranges_of_ratios(speed):
    times = {"0 workers": [4, 8, 9], "2 workers": [3, 6, 8], "before": [2, 2, 2], "after": [1, 3, 2]}
    expected = {"experiment": "train", "rounds": 3, "common loop": "6 s, 2 workers"}
    expected |= {"common loop / after": "3.00 (2.00 to 4.00)", "before": "2 s"}
    expected |= {"before / after": "1.00 (0.67 to 2.00)", "after": "2 s"}
    assert speed.summary("train", times) == expected


def test_shares_are_of_the_operations_own_time_and_on_a_gpu_of_their_kernels(speed):
    """In microseconds; an annotation's time on a GPU is that of the kernels in it."""

    def event(key, cpu, gpu, device=DeviceType.CPU, annotation=False):
        names = {"key": key, "device_type": device, "is_user_annotation": annotation}
        return SimpleNamespace(**names, self_cpu_time_total=cpu, self_device_time_total=gpu)

    events = [event("aten::mkldnn_convolution", 10, 100), event("aten::convolution_backward", 20, 200)]
    events += [event("autograd::engine::evaluate_function: ConvolutionBackward0", 5, 0), event("aten::copy_", 15, 50)]
    events += [event("sm90_xmma_fprop", 0, 350, DeviceType.CUDA), event("Adam", 0, 350, DeviceType.CUDA, True)]
    row = speed.shares(events[:4], False, 100e-6, 100e-6)
    kinds = "convolutions backward", "convolutions forward", "casts and copies", "batch norm", "rest"
    assert [row[kind] for kind in kinds] == ["20.0%", "10.0%", "15.0%", "0.0%", "55.0%"]
    row = speed.shares(events, True, 1000e-6, 200e-6)
    assert [row[kind] for kind in ("kernels", *kinds)] == ["35.0%", "20.0%", "10.0%", "5.0%", "0.0%", "65.0%"]
    assert row["longest on the CPU"].startswith("aten::convolution_backward 10%, aten::copy_ 8%")


def test_a_part_of_gpu_sh_that_fails_or_takes_too_long_does_not_stop_the_next(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $* in *--compile*) sleep 60;; *speed*) exit 3;; esac; echo $*\n")
    python.chmod(0o755)
    options = {"env": os.environ | {"PYTHON": str(python), "TOTAL": "4"}, "cwd": ROOT, "check": True}
    subprocess.run(["benchmarks/gpu.sh", tmp_path / "out", "DATA", "--limit", "8"], **options)
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    codes = [line.split("exit code ")[1].split(":")[0] for line in lines if "exit code" in line]
    assert codes == ["3", "124", "0", "3", "124", "3", "124"]
    assert "pytest -m cuda" in (tmp_path / "out" / "tests.txt").read_text()
    assert all("--data DATA" in line and line.endswith("--limit 8") for line in lines if "speed.py" in line)
