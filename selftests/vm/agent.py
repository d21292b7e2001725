# SPDX-License-Identifier: GPL-2.0
"""The host's end of the line to the shell in L2; l2-init is the other end."""

from __future__ import annotations

import re
import socket
import time
from typing import NamedTuple

from .patience import PATIENCE


class AgentTimeout(RuntimeError):
    """The guest did not answer in time."""


class Result(NamedTuple):
    """What a command in the guest came to."""

    status: int
    output: str


class Agent:
    """Sends commands to the guest's shell, one at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._number = 0

    def wait_ready(self, timeout: float, again: bool = False) -> int:
        """Waits for the guest's init; returns the exit status of its /start script.

        again: this is not the first init, and what the one before was saying is passed over.
        """
        deadline = time.monotonic() + timeout
        while True:
            line = self._line(deadline)
            if match := re.search(r"READY (\d+)$" if again else r"^READY (\d+)$", line):
                return int(match[1])
            if not again:
                raise RuntimeError(f"the guest's init said {line!r} first")

    def send(self, command: str) -> int:
        """Starts a command; its number is for `receive`."""
        self._number += 1
        lines = command.strip("\n").split("\n")
        text = "".join(f"{line}\n" for line in (f"RUN {self._number} {len(lines)}", *lines))
        self._connection.settimeout(PATIENCE)
        self._connection.sendall(text.encode())
        return self._number

    def receive(self, number: int, timeout: float) -> Result:
        """Waits for the end of a command."""
        deadline = time.monotonic() + timeout
        while True:
            verb, done, status, size = self._line(deadline).split()
            output = self._bytes(int(size), deadline).decode(errors="replace")
            # An answer nobody waited for any more belongs to a command that timed out.
            if verb == "DONE" and int(done) == number:
                return Result(int(status), output)

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._received:
            self._more(deadline)
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _bytes(self, size: int, deadline: float) -> bytes:
        while len(self._received) < size:
            self._more(deadline)
        data, self._received = self._received[:size], self._received[size:]
        return data

    def _more(self, deadline: float) -> None:
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._connection.recv(65536)
        except TimeoutError:
            raise AgentTimeout("no answer from the guest in time") from None
        if not data:
            raise RuntimeError("the VMM closed the line to the guest")
        self._received += data
