"""Messages between processes: JSON with its length before it. Nothing that is received is executed."""

import json
import socket
import struct
import threading
from typing import Any

LARGEST = 2**26  # bytes of a message
BEAT, SILENCE = 5.0, 40.0  # seconds between two signs of life; without one for so long a process counts as dead


class Connection:
    """A socket that several threads write to. Only one reads."""

    def __init__(self, stream: socket.socket):
        self._stream, self._lock = stream, threading.Lock()
        stream.settimeout(SILENCE)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict[str, Any]) -> None:
        """OSError if the other side is gone."""
        text = json.dumps(message).encode()
        with self._lock:
            self._stream.sendall(struct.pack(">I", len(text)) + text)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other side has closed the connection. OSError, TimeoutError after SILENCE,
        ValueError for what is no message."""
        head = self._read(4)
        if head is None:
            return None
        (size,) = struct.unpack(">I", head)
        if size > LARGEST:
            raise ValueError(f"a message of {size} bytes")
        body = self._read(size)
        message = None if body is None else json.loads(body)
        if message is not None and not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def _read(self, size: int) -> bytes | None:
        parts = []
        while size:
            part = self._stream.recv(min(size, 2**20))
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._stream.close()
