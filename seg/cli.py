"""The shared command line: flags, signals and exit codes."""

import argparse
import atexit
import contextlib
import errno
import gc
import io
import os
import re
import sys
import textwrap
from pathlib import Path

import torch

from seg import distributed, imaging, signals
from util import UserError, is_out_of_memory, reason

_running = False  # whether ``run`` has been called


class Parser(argparse.ArgumentParser):
    """An argparse parser that shows the description as it is written and raises a UserError for a wrong flag."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        hint = "in a notebook, pass argv=[...]" if "ipykernel" in sys.modules else "--help explains the flags"
        raise UserError(f"{message} ({hint})")


def arguments(script, doc, epochs, batch_size, pretrained=False, argv=None, **own):
    """Parse the flags of an experiment, and join the other processes if torchrun started several.

    Args:
        script, doc: the script's ``__file__`` and its docstring, which ``--help`` shows; in a notebook, a name for the
            run's files and its title.
        epochs, batch_size: the experiment's defaults.
        pretrained: whether the experiment starts from pretrained weights; adds the flag ``--no-pretrained``.
        argv: the flags, a list of str; None: those of the command line.
        own: flags of the experiment's own, see ``add_flags``; not title, experiment, script or defaults.

    Returns an argparse.Namespace with the flags (device a torch.device, out a Path, limit an int or None), script (a
    Path), experiment (the stem of its files' names), title, and defaults (a dict of epochs, batch_size and own flags).
    """
    parser = shared_flags(doc, epochs, batch_size, pretrained)
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: %(default)s")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from last_*.pt, or start if there is none")
    existing.add_argument("--overwrite", action="store_true", help="delete the experiment's earlier run in --out first")
    args = add_flags(parser, own).parse_args(argv)
    args.script, args.defaults = Path(script), {"epochs": epochs, "batch_size": batch_size} | own
    title = re.split(r":|\.(?=\s|$)|\n", (doc or "").strip())[0]  # up to the first colon, full stop or end of line
    args.title = textwrap.shorten(title, 60, placeholder=" ...")
    args.experiment = args.script.stem + ("" if getattr(args, "pretrained", True) else "_no_pretrained")
    args.device = distributed.join(args.device)
    return args


def add_flags(parser, defaults):
    """Add a flag for each entry of a dict, of its value's type: float, int, str or bool; return the parser.

    ``{"max_lr": 0.1}`` adds ``--max-lr``, and ``{"flip": True}`` adds ``--flip`` and ``--no-flip``.
    """
    for name, value in defaults.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help="default: %(default)s", **kind)
    return parser


def shared_flags(doc, epochs=None, batch_size=None, pretrained=True):
    """A Parser with the flags that experiments and compare.py have in common; see ``arguments``."""
    default = "default: the experiment's own" if epochs is None else "default: %(default)s"
    parser = Parser(doc)
    data = "data/VOCdevkit/VOC2007"
    parser.add_argument("--data", default=data, metavar="DIR", help="folder in VOC layout (default: %(default)s)")
    parser.add_argument("--epochs", type=integer(1), default=epochs, metavar="N", help=default)
    parser.add_argument("--batch-size", type=integer(1), default=batch_size, metavar="N", help=default)
    parser.add_argument("--device", type=parse_device, default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--out", type=Path, default=".", metavar="DIR", help="output folder (default: this folder)")
    parser.add_argument("--limit", type=integer(1), metavar="N", help="use only the first N images of each split")
    parser.add_argument("--compile", action="store_true", help="compile the network during the first epoch")
    if pretrained:
        text = "start ResNet-18 from random weights, to try the script; file names get _no_pretrained"
        parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help=text)
    return parser


def integer(smallest, largest=2**32 - 1):  # NumPy takes no larger seed
    """An argparse type: an integer in a range."""

    def parse(text):
        if not text.lstrip("+-").isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {smallest} to {largest}")
        return int(text)

    return parse


def parse_size(text):
    """An argparse type: (height, width) from N for a square or WIDTHxHEIGHT, in multiples of 32."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if any(side % 32 or not 0 < side <= imaging.MAX_SIDE for side in (width, height)):
        problem = f"{text!r} is neither N nor WIDTHxHEIGHT in multiples of 32 up to {imaging.MAX_SIDE}"
        raise argparse.ArgumentTypeError(problem)
    return height, width


def parse_device(text):
    """An argparse type: a torch.device that this machine has."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if text == "cuda" and torch.cuda.is_available():
        return torch.device(text)  # using it here would occupy the first GPU for every process
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason(error)}): use --device cpu") from None
    return torch.device(text)


def run(main):
    """Call ``main()`` as a command: exit code 2 and one line for an error that the user can correct.

    After a signal (seg/signals.py) the exit code is 130 or 143, and 1 if another process is gone.
    """
    global _running
    if _running:
        raise UserError('an imported script starts a run: put its cli.run(main) below if __name__ == "__main__":')
    _running = True
    gc.freeze()  # searching PyTorch's modules for garbage, again and again, took 4 % of a short run
    atexit.register(gc.freeze)  # and searching all modules at the end a second
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as in a Windows service
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding lacks
    try:
        with signals.handled():
            _call(main)
    finally:
        _running = False


def _call(main):
    """Call ``main()``, and end the process for an error that is not a fault of the code."""
    try:
        main()
        sys.stdout.flush()  # here, where an error becomes a message
        distributed.leave()
    except UserError as error:
        if distributed.is_main():  # the others have the same
            _fail(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _fail(f"out of memory ({reason(error)}): lower the batch size or the input's size")
        if not distributed.is_connection_lost(error):
            raise
        signals.check()  # another process has stopped a moment earlier
        _fail(f"rank {distributed.rank()} stopped because another process is gone: {error}", code=1)
    except OSError as error:
        if error.filename is not None and isinstance(error, PermissionError):
            _fail(f"{error.filename}: {error.strerror}: change its permissions, or choose another path")
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        if error.errno == errno.EPIPE:  # the reader of our output, such as ``head``, has closed the pipe
            sys.exit(141)  # a shell's exit code for SIGPIPE
        _fail(f"the output cannot be written ({error.strerror}): free some space")


def _fail(message, code=2):
    """Print an error and end the process."""
    with contextlib.suppress(OSError):  # stderr may be on a full disk
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
