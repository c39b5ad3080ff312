"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM (what schedulers send before they kill)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopping(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """While this lasts, the first SIGINT or SIGTERM calls `stop`; a second one ends the process at once.

    Handlers belong to the main thread; in another one nothing is changed. An ignored signal (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def handle(number: int, _frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"\nlm-saes: {name}: saving after this step; once more ends the run at once\n".encode())
        stop(signal.Signals(number))

    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)
