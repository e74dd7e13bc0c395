"""A signal that one process receives stops all of them after the same step."""

import os
import signal
import time

from alst_jax.processes.link import link


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the step in progress; a second one stops at once. planned: seconds of a
    step by the plan."""

    def __init__(self, planned: float | None = None):
        self.received: signal.Signals | None = None
        self.began, self.seconds = 0.0, planned  # when the step in progress began; seconds of the last one

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def shared(self) -> bool:
        """Whether any process of the run received a signal: all stop after the same step."""
        received = next((number for number in link().exchange("stop", self.received) if number is not None), None)
        self.received = self.received if received is None else signal.Signals(received)
        return received is not None

    def _handle(self, number, _frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        seconds = max(0.0, self.began + (self.seconds or 0) - time.perf_counter())
        left = "" if self.seconds is None else f", in about {seconds:.0f} s"
        text = f"\n{self.received.name}: saving after this step{left}; once more stops at once\n"
        os.write(2, text.encode())  # not print(): a handler may run in the middle of one
