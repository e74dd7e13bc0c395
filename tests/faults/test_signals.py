# python -m pytest tests/faults/test_signals.py
"""A signal says when the state will be saved: at the end of the step, of which the last one's time is known."""

import re
import signal
import time

import pytest

from alst_jax.processes.stop import StopSignal


def test_the_time_to_the_save_is_said(capfd):
    with StopSignal() as stop:
        stop.began, stop.seconds = time.perf_counter() - 100, 490.0
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        said = re.search(
            "SIGTERM: saving after this step, in about (\\d+) s; once more stops at once", capfd.readouterr().err
        )
        assert 388 <= int(said[1]) <= 390
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_the_first_step_has_no_time_yet(capfd):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
    assert "SIGINT: saving after this step; once more" in capfd.readouterr().err
