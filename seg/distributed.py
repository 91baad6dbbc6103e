"""Rank and world size under torchrun, sums over all processes, bfloat16 support, memory format, malloc settings."""

import contextlib
import ctypes
import datetime
import os
import sys

import torch
from torch import distributed as dist

from seg import signals
from util import UserError


def join(device):
    """Join the process group if torchrun started several processes; return this one's torch.device."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if not world_size.isdecimal() or int(world_size) < 2:
        return device
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        print(f"warning: WORLD_SIZE is {world_size} without {', '.join(missing)}: running alone", file=sys.stderr)
        return device
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {device}: with several processes, each takes its own GPU: pass --device cuda")
        num_gpus = torch.cuda.device_count()
        local_rank = int(os.environ.get("LOCAL_RANK") or os.environ["RANK"])
        if local_rank >= num_gpus:
            raise UserError(f"--nproc-per-node: this machine has {num_gpus} GPUs: start at most one process per GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {device}: several processes run on cuda or cpu only: choose one of these")
    is_cuda = device.type == "cuda"
    timeout = datetime.timedelta(hours=1)  # the main process may decode all images before the others go on
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timeout, device_id=device if is_cuda else None)
    return device


def leave():
    """End this process normally if it is one of several."""
    if world_size() == 1:
        return
    if dist.get_backend() == "nccl":
        dist.destroy_process_group()
        return
    # Destroying a gloo group hangs in torch 2.6, and sometimes aborts if another process has left before.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_connection_lost(error):
    """Whether an exception means that another process is gone."""
    return world_size() > 1 and (isinstance(error, dist.DistBackendError) or "gloo" in str(error))


def rank():
    """The rank of this process; 0 unless torchrun started several."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size():
    """The number of processes; 1 unless torchrun started several."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main():
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def all_reduce(tensor, device):
    """The sum of a tensor over all processes, on ``device``; a single process gets the tensor back as it is."""
    if world_size() > 1:
        tensor = tensor.to(device, copy=True)
        dist.all_reduce(tensor)
    return tensor


def stoppable(items, min_count=0):
    """Yield items; before each of them, a signal stops this process.

    Several processes stop before the same item: each of them has at least ``min_count`` items. On GPUs, which have to
    be waited for, they ask each other only before every tenth.
    """
    for index, item in enumerate(items):
        if world_size() == 1:
            signals.check()
        elif index < min_count and (index % 10 == 0 or dist.get_backend() == "gloo"):
            device = "cpu" if dist.get_backend() == "gloo" else "cuda"
            if all_reduce(torch.tensor(signals.received or 0), device).item():  # a later signal waits for the next
                signals.check(elsewhere=True)
        yield item


def broadcast_object(value, device):
    """The main process's ``value``, of plain types, in all processes."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


def broadcast(tensors):
    """Copy the main process's values of some tensors to the other processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@contextlib.contextmanager
def main_process_first():
    """Run the block in the main process before the others, for example to write a file that they read."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and world_size() > 1:
        dist.barrier()


def has_bfloat16(device):
    """Whether a device is faster in bfloat16 than in float32: GPUs since Ampere, CPUs with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def device_name(device):
    """A device with what its speed depends on: "cpu, 2 threads, bfloat16"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name += f", {threads} threads" if threads > 1 else ", 1 thread"
    return name + (", bfloat16" if has_bfloat16(device) else "")


def memory_format(device):
    """channels_last, which is faster, but contiguous on Apple GPUs."""
    # there, many releases of PyTorch compute wrong gradients of batch norm (pytorch issue 175189)
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def set_malloc_options(device):
    """On a CPU with glibc, keep freed memory for the next batch: mapping it anew takes time."""
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system, without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD of glibc's malloc.h: no trimming
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping
