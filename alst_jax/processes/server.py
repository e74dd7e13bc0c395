"""Process 0's side of the link: it collects the values of all processes, and tells all when one of them ends."""

import socket
import threading
import time
from typing import Any

from alst_jax.declare import UserError
from alst_jax.processes.place import Place
from alst_jax.processes.wire import BEAT, SILENCE, Connection

AGREE = 0.5  # seconds in which process 0 may report the same mistake as another process
UNREAD = "stopped, since nothing reads standard output of process 0 any more; go on with --resume"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Server:
    """Threads of process 0, one for each process. They end with the program."""

    def __init__(self, place: Place, timeout: float):
        self._place, self._timeout = place, timeout
        self._listener = _listen(place)
        self._lock = threading.RLock()
        self._members: dict[int, Connection] = {}
        self._hosts: dict[int, str] = {}
        self._given: dict[int, dict[int, tuple[str, Any]]] = {}  # number of an exchange -> rank -> (name, value)
        self._gone: set[int] = set()  # processes that have said goodbye
        self._all_gone = threading.Event()
        self._over: tuple[int, str, int] | None = None  # the process that ended the run, why, exit code
        for target in (self._accept, self._beat, self._expect_all):
            threading.Thread(target=target, daemon=True).start()

    # ------------------------------------------------------------------------------------------------------ processes

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:  # the program ends
                return
            threading.Thread(target=self._serve, args=(Connection(stream),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            hello = connection.receive()
        except (OSError, ValueError):
            hello = None
        rank = (hello or {}).get("rank")
        if hello is None or hello.get("kind") != "hello" or not isinstance(rank, int) or rank < 0:
            connection.close()  # another program
            return
        if not self._welcome(rank, hello, connection):
            return
        why = "ended without a word: it was killed or crashed"
        try:
            while (message := connection.receive()) is not None:
                self._take(rank, message)
        except TimeoutError:
            why = "gives no sign of life: it was stopped, or its host or the network is gone"
        except (OSError, ValueError) as error:
            why = f"is out of reach ({error})"
        if rank not in self._gone:
            self.end(rank, why, 1)

    def _welcome(self, rank: int, hello: dict[str, Any], connection: Connection) -> bool:
        count = self._place.count
        with self._lock:
            wrong = None
            if hello.get("count") != count:
                wrong = (
                    f"--processes {hello.get('count')} on process {rank}, and {count} on process 0; use the same number"
                )
            elif rank in self._members:
                wrong = (
                    f"two processes are number {rank} (--process): one on {self._hosts[rank]}, another on "
                    f"{hello.get('host')}; count them from 0 to {count - 1}"
                )
            begun = len(self._members) == count
            if wrong is None and not self._over:
                self._members[rank], self._hosts[rank] = connection, str(hello.get("host"))
                return True
        if wrong is not None and not begun:
            self.end(0, wrong, 2)
        rank, text, code = (0, wrong, 2) if wrong is not None else self._over
        self._send(connection, _end(rank, self._hosts.get(rank, ""), text, code, "you"))
        return False

    def _expect_all(self) -> None:
        time.sleep(self._timeout)
        missing = [str(rank) for rank in range(self._place.count) if rank not in self._members]
        if missing:
            some = ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)
            self.end(
                0,
                f"{'processes' if len(missing) > 1 else 'process'} {some} of {self._place.count} did not come within "
                f"{self._timeout:.0f} s; start them, or wait longer with --start-timeout",
                2,
            )

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            for connection in list(self._members.values()):
                self._send(connection, {"kind": "beat"})

    # ------------------------------------------------------------------------------------------------------- messages

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "give":
            self._give(rank, message["number"], message["name"], message["value"])
        elif kind == "say":
            try:
                print(f"process {rank} ({self._hosts[rank]}): {message['text']}", flush=True)
            except BrokenPipeError:
                self.end(0, UNREAD, 141)
        elif kind == "fail":
            if rank and message["code"] == 2:
                time.sleep(AGREE)
            self.end(rank, message["text"], message["code"])
        elif kind == "bye":
            with self._lock:
                self._gone.add(rank)
                if len(self._gone) == self._place.count:
                    self._all_gone.set()

    def _give(self, rank: int, number: int, name: str, value: Any) -> None:
        with self._lock:
            given = self._given.setdefault(number, {})
            given[rank] = name, value
            if len(given) < self._place.count:
                return
            del self._given[number]
            members = list(self._members.values())
        places = {name for name, _ in given.values()}
        if len(places) > 1:
            where = ", ".join(f"process {rank} at {name!r}" for rank, (name, _) in sorted(given.items())[:4])
            self.end(0, f"the processes do different things ({where}); this is a mistake of the program", 1)
            return
        values = [given[rank][1] for rank in range(self._place.count)]
        for connection in members:
            self._send(connection, {"kind": "all", "number": number, "values": values})

    def outlive(self) -> None:
        """Return when all processes have said goodbye, or after SILENCE seconds. Process 0 must not end before: a
        process that has not said goodbye may still wait for an answer."""
        self._all_gone.wait(SILENCE)

    def end(self, rank: int, text: str, code: int) -> None:
        """Tell all processes to end because of process `rank`. Only the first call counts."""
        with self._lock:
            if self._over:
                return
            self._over = rank, text, code
            members = sorted(self._members.items(), reverse=True)  # process 0 last: it ends with this thread
        for _, connection in members:
            self._send(connection, _end(rank, self._hosts.get(rank, ""), text, code, "first" if code == 2 else "all"))

    @staticmethod
    def _send(connection: Connection, message: dict[str, Any]) -> None:
        try:
            connection.send(message)
        except OSError:  # the thread that reads from it reports its end
            return


def _end(rank: int, host: str, text: str, code: int, speaker: str) -> dict[str, Any]:
    """speaker: who prints the text: "all", "first" (process 0) or "you"."""
    return {"kind": "end", "rank": rank, "host": host, "text": text, "code": code, "speaker": speaker}


def _listen(place: Place) -> socket.socket:
    local = place.host in LOOPBACK
    both = socket.has_dualstack_ipv6() and not local
    try:
        return socket.create_server(
            ("127.0.0.1" if local and place.host != "::1" else "::1" if local else "", place.port),
            family=socket.AF_INET6 if both or place.host == "::1" else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=1024,
        )
    except OSError as error:
        raise UserError(
            f"--coordinator {place.host}:{place.port}: process 0 cannot listen on port {place.port} "
            f"({error.strerror or error}); use another port, the same for all processes"
        ) from error
