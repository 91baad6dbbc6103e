"""Ctrl-C and SIGTERM: the handler only notes the signal, and loops ask for it between batches, images and files.

A handler that raises an exception would lose a signal that arrives in a destructor or in a callback of a weak
reference, where Python prints the exception and goes on.
"""

import contextlib
import os
import signal
import sys
import time

received = None  # the number of the signal
PATIENCE = 10  # seconds in which a run that Ctrl-C has reached should have ended


@contextlib.contextmanager
def handled():
    """During the block, ``check`` stops this process after a signal, and a second signal ends it at once."""
    global received
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, _note)
    try:
        yield
    finally:
        received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number, frame):
    global received
    received = number
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is _note:
            signal.signal(each, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):  # in a handler, print is not safe
        os.write(sys.stderr.fileno(), b"\nstopping; a second signal ends the process at once\n")


def check():
    """Raise SystemExit, with a shell's exit code for the signal, if this process has received one."""
    if received is not None:
        stop()


def stop():
    """Raise SystemExit for the signal that this process has received, or another one under torchrun."""
    sys.exit(128 + (received or signal.SIGTERM))


def wait(process):
    """Wait for a subprocess.Popen. A signal is passed on to it; Ctrl-C only late, as a terminal sends it to both."""
    stop_at = None
    while process.poll() is None:
        if received is not None and stop_at is None:
            stop_at = time.monotonic() + (PATIENCE if received == signal.SIGINT else 0)
        if stop_at is not None and time.monotonic() >= stop_at:
            process.terminate()
            stop_at = float("inf")
        time.sleep(0.1)
    check()
