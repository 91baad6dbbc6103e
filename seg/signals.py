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


def check(elsewhere=False):
    """Raise SystemExit, with a shell's exit code, if this process, or one ``elsewhere``, has received a signal."""
    if elsewhere or received is not None:
        sys.exit(128 + (received or signal.SIGTERM))


def wait(process):
    """Wait for a subprocess.Popen. A signal is passed on to it; Ctrl-C only late, as a terminal sends it to both."""
    patience = 10  # seconds in which a run that Ctrl-C has reached should have ended
    while process.poll() is None and patience > 0:
        time.sleep(0.1)
        if received is not None:
            patience = patience - 0.1 if received == signal.SIGINT else 0
    if process.poll() is None:
        process.terminate()
        process.wait()
    check()
