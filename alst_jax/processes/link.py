"""The link between the processes of a run: they exchange small values over it, and notice when one of them ends.

Each process has a connection to process 0, over TCP, beside jax. jax's own service ends the other processes from C++
with a stack trace that does not say which one died. Here a closed connection, or no sign of life for SILENCE seconds,
ends all of them with one line that names it. A run in one process has the link `Alone`, which does none of this.
"""

import contextlib
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from alst_jax.declare import UserError
from alst_jax.processes.place import Place, machine
from alst_jax.processes.server import LOOPBACK, Server
from alst_jax.processes.wire import BEAT, SILENCE, Connection

# An error of these words may come from the death of another process, which is reported after SILENCE at the latest.
OF_OTHERS = re.compile(r"gloo|nccl|connection|coordination|barrier|deadline|heartbeat|peer", re.IGNORECASE)
SETTLE = 2.0  # seconds in which the end of another process is noticed, if the system says so
LAST = 1.0  # seconds for which process 0 outlives the others, so that its last messages arrive


class Alone:
    """The link of a run in one process: nothing is sent, nobody is waited for."""

    rank, count, hosts, machines, how = 0, 1, ("",), ("",), None
    local_ranks: Sequence[int] = (0,)  # numbers of the processes on this host
    first, several = True, False

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The values that all processes give, in the order of their numbers. All must call it with the same name."""
        return [value]

    def told(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() gives in process 0: JSON."""
        return make()

    def in_turn(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), first in process 0: the others find in its caches what they share."""
        return make()

    def wait(self, name: str) -> None:
        """Return when all processes are here."""

    def same(self, what: str, value: Any) -> None:
        """UserError unless all processes have the same value."""

    def disagree(self, text: str) -> NoReturn:
        """Raise a UserError that all processes have found. Process 0 reports it."""
        raise UserError(text)

    def say(self, text: str) -> None:
        """Print a line, also of a process that does not log."""
        print(text, flush=True)

    def failed(self, text: str, code: int) -> int:
        """Report why the run ends. Returns the exit code."""
        print(f"\n{text}", file=sys.stderr)
        return code

    def crashed(self, error: BaseException) -> None:
        """Report an error that is none of a user's, before it is raised again."""

    def finish(self, leave: Callable[[], None] = lambda: None, last: Callable[[], None] = lambda: None) -> None:
        """End together: leave() in all processes, then last() when all have left."""


class Link(Alone):
    """hosts: the host of each process, for messages. machines: the same, different for two machines of one name.
    facts: what each process said of itself at the start."""

    several = True

    def __init__(self, place: Place, facts: dict[str, Any], timeout: float):
        """Come together with the other processes. UserError for an address that is taken or does not answer."""
        self.place, self.rank, self.count, self.how = place, place.rank, place.count, place.how
        self.first = place.rank == 0
        self._errors = sys.stderr  # before it is silenced
        self._number, self._answers, self._leaving = 0, queue.Queue(), False
        self._final = 0
        self._joined = threading.Event()
        if self.first:
            self._server = Server(place, timeout)
        self.host = socket.gethostname()
        self.hosts = self.machines = (self.host,) * place.count
        self._connection = Connection(_connect(place, timeout))
        self._connection.send({"kind": "hello", "rank": self.rank, "count": self.count, "host": self.host})
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        self._expect_answer(timeout)
        self.facts = self.exchange("hello", {"host": self.host, "machine": machine()} | facts)
        self._joined.set()
        self.hosts, self.machines = (tuple(fact[name] for fact in self.facts) for name in ("host", "machine"))

    @property
    def local_ranks(self) -> list[int]:
        """The numbers of the processes on this host."""
        return [rank for rank, other in enumerate(self.machines) if other == self.machines[self.rank]]

    # ------------------------------------------------------------------------------------------------------- exchange

    def exchange(self, name: str, value: Any) -> list[Any]:
        self._number += 1
        try:
            self._connection.send({"kind": "give", "number": self._number, "name": name, "value": value})
        except OSError:  # the thread that reads says why, and ends this process
            time.sleep(SILENCE)
        number, values = self._answers.get()
        if number != self._number:
            raise RuntimeError(f"answer {number} of the link, where {self._number} ({name}) was asked")
        return values

    def told(self, name: str, make: Callable[[], Any]) -> Any:
        return self.exchange(name, make() if self.first else None)[0]

    def in_turn(self, name: str, make: Callable[[], Any]) -> Any:
        if self.first:
            made = make()
            self.wait(name)
            return made
        self.wait(name)
        return make()

    def wait(self, name: str) -> None:
        self.exchange(name, None)

    def same(self, what: str, value: Any) -> None:
        values = self.exchange(what, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                self.disagree(
                    f"{what} must be the same in all processes, and process {rank} ({self.hosts[rank]}) has "
                    f"{_short(other)} where process 0 ({self.hosts[0]}) has {_short(values[0])}"
                )

    def disagree(self, text: str) -> NoReturn:
        if not self.first:
            time.sleep(SILENCE)  # the thread that reads ends this process before
        raise UserError(text)

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)
        else:
            self._connection.send({"kind": "say", "text": text})

    # -------------------------------------------------------------------------------------------------------- the end

    def failed(self, text: str, code: int) -> NoReturn:
        """End all processes. The text is printed once, with the number of this one."""
        self._send_quietly({"kind": "fail", "text": text, "code": code})
        time.sleep(SILENCE)  # the thread that reads ends this process before
        self.end(f"{self._me()}: {text}", code)

    def crashed(self, error: BaseException) -> NoReturn:
        """End all processes because of an error, or because of the death of another one that may have caused it."""
        words = "".join(traceback.format_exception_only(error)).strip()
        time.sleep(SILENCE + BEAT if OF_OTHERS.search(words) else SETTLE)
        print(f"{self._me()}:\n{''.join(traceback.format_exception(error))}", file=self._errors, flush=True)
        self.failed(f"ended with {words.splitlines()[0][:500]}", 1)

    def finish(self, leave: Callable[[], None] = lambda: None, last: Callable[[], None] = lambda: None) -> None:
        self.wait("finish")
        leave()
        self._final = self._number + 1  # from its answer on, the end of a process is no death
        self.wait("left")
        last()
        self._send_quietly({"kind": "bye"})
        if self.first:
            self._server.outlive()

    def _me(self) -> str:
        return f"{self.place} ({self.host})"

    def _send_quietly(self, message: dict[str, Any]) -> None:
        try:
            self._connection.send(message)
        except OSError:  # the thread that reads says why
            return

    def _beat(self) -> None:
        while True:
            self._send_quietly({"kind": "beat"})
            time.sleep(BEAT)

    def _read(self) -> None:
        """The thread that reads what process 0 sends, and ends this process when it must."""
        reason = "ended without a word: it was killed or crashed"
        try:
            while (message := self._connection.receive()) is not None:
                if message["kind"] == "all":
                    self._leaving = message["number"] == self._final
                    self._answers.put((message["number"], message["values"]))
                elif message["kind"] == "end":
                    self._obey(message)
        except TimeoutError:
            reason = "gives no sign of life: it was stopped, or its host or the network is gone"
        except (OSError, ValueError) as error:
            reason = f"is out of reach ({error})"
        if self._leaving:
            return
        if not self._joined.is_set():
            self.end(
                f"error: --coordinator {self.place.host}:{self.place.port}: what listens there is no process 0 of a "
                "run, or it has ended; see its output, or use another port",
                2,
            )
        self.end(
            f"error: process 0 of {self.count} ({self.hosts[0]}) {reason}; {self.place} ends too. Go on with --resume",
            1,
        )

    def _obey(self, message: dict[str, Any]) -> NoReturn:
        text, rank, code = message["text"], message["rank"], message["code"]
        if code == 2 or code >= 128:
            named = text if not rank else text.replace("error: ", f"error: process {rank} ({message['host']}): ", 1)
            named = named if named.startswith(("error: ", "stopped")) else f"error: {named}"
            speaks = message["speaker"] == "you" or self.first
            self.end(f"\n{named}" if speaks else "", code)
        who = "" if rank == self.rank else f"; {self.place} ends too"
        self.end(f"\nerror: process {rank} of {self.count} ({message['host']}) {text}{who}. Go on with --resume", code)

    def end(self, text: str, code: int) -> NoReturn:
        """End this process from any of its threads. The main thread may wait in a collective for ever."""
        if text:
            print(text, file=self._errors, flush=True)
        if self.first:
            time.sleep(LAST)
        with contextlib.suppress(BrokenPipeError):  # nothing reads what is left; the process must end all the same
            sys.stdout.flush()
        os._exit(code)

    def _expect_answer(self, timeout: float) -> None:
        def give_up():
            if not self._joined.wait(timeout + SETTLE + BEAT):
                self.end(
                    f"error: --coordinator {self.place.host}:{self.place.port} did not answer within {timeout:.0f} s "
                    f"(--start-timeout): {self.place} ends. Is process 0 there?",
                    2,
                )

        threading.Thread(target=give_up, daemon=True).start()


def _connect(place: Place, timeout: float) -> socket.socket:
    deadline, host = time.monotonic() + timeout, place.host
    if not place.rank and host not in LOOPBACK:
        host = "localhost"
    while True:
        try:
            return socket.create_connection((host, place.port), timeout=max(1.0, min(10.0, timeout)))
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator {place.host}:{place.port} did not answer within {timeout:.0f} s "
                    f"(--start-timeout): {error.strerror or error}. {place} ends; is process 0 there?"
                ) from error
            time.sleep(0.2)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


_current: Alone = Alone()


def link() -> Alone:
    """The link of this process."""
    return _current


def use(new: Alone) -> None:
    """Make this the link of this process."""
    global _current
    _current = new
