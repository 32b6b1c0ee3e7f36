"""How the processes of a run meet before jax joins them: each tells process 0 what it is, and hears who the others are.

They meet at the address where process 0 starts jax's coordinator afterwards, so that no other port must be known.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from mara_jax.parallel import fingerprint

SECONDS = 300.0  # in which all processes must arrive; machines of a cluster start minutes apart
WAIT = 1.0  # seconds, for bytes on a connection
AGAIN = 0.25  # seconds after which a process looks again for process 0
_RECEIVED = 65536  # bytes at once
_CURE = "start all of them with the same --coordinator_address and --num_processes, each with its own --process_id"


class Place(NamedTuple):
    """A process among those of a run: HOST:PORT of process 0, how many there are, and which this one is.

    local_devices: numbers of the devices of its machine that it shall use; None for all.
    """

    address: str
    count: int
    process: int
    local_devices: tuple[int, ...] | None = None


class Connection:
    """A connection on which each line is a JSON object; several threads may send, one receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(WAIT)
        self.socket, self.unread, self.lock = connected, b"", threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message, or nothing where the other end is gone, which receiving tells."""
        with self.lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def received(self) -> list[dict[str, Any]] | None:
        """Waits a second for bytes: the messages that are now complete; None at the connection's end."""
        try:
            received = self.socket.recv(_RECEIVED)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not received:
            return None
        *lines, self.unread = (self.unread + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def first(self, deadline: float) -> dict[str, Any] | None:
        """The first message; None where none comes in time, or what comes is none."""
        with contextlib.suppress(OSError, ValueError):
            while b"\n" not in self.unread and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    received = self.socket.recv(_RECEIVED)
                    if not received:
                        return None
                    self.unread += received
            line, _, self.unread = self.unread.partition(b"\n")
            message = json.loads(line)
            return message if isinstance(message, dict) else None
        return None


def meet(
    place: Place, settings: Mapping[str, Any], seconds: float = SECONDS
) -> tuple[dict[int, Connection], dict[int, str]]:
    """Waits until all processes are there.

    Args:
      settings: as of `fingerprint.of_process`.
      seconds: after which they are refused.

    Returns:
      Connections of process 0 to all others, of another one to process 0; and how to call each process.

    Raises:
      ValueError: one line on every process; one is missing, or has another fingerprint.
    """
    own = {
        "run": "mara_jax",
        "process": place.process,
        "name": f"process {place.process} (pid {os.getpid()} on {socket.gethostname()})",
        "fingerprint": fingerprint.of_process({"num_processes": place.count} | {**settings}),
    }
    deadline = time.monotonic() + seconds
    return _arrive(place, own, deadline, seconds) if place.process else _gather(place, own, deadline, seconds)


def _gather(
    place: Place, own: dict[str, Any], deadline: float, seconds: float
) -> tuple[dict[int, Connection], dict[int, str]]:
    """As `meet`, on process 0."""
    peers, greetings, twice = {}, {0: own}, None
    with _listener(place) as listener:
        while len(greetings) < place.count and twice is None and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection = _prompt(listener.accept()[0])
                greeting = connection.first(min(deadline, time.monotonic() + 5)) or {}
                if greeting.get("run") != own["run"]:
                    continue  # a stranger
                twice = greeting["process"] if greeting["process"] in greetings else None
                if twice is None:
                    peers[greeting["process"]], greetings[greeting["process"]] = connection, greeting
                else:
                    connection.send(refusal=f"another process is process {twice}, too: {_CURE}")
    names = {process: greeting["name"] for process, greeting in sorted(greetings.items())}
    refusal = _refusal(place, greetings, names, twice, seconds)
    for connection in peers.values():
        connection.send(**({"refusal": refusal} if refusal else {"names": list(names.items())}))
    if refusal:
        raise ValueError(refusal)
    return peers, names


def _refusal(
    place: Place, greetings: Mapping[int, Any], names: Mapping[int, str], twice: int | None, seconds: float
) -> str | None:
    """Why these processes are no run; None where they are one."""
    if twice is not None:
        return f"two processes are process {twice}: {_CURE}"
    refusal = fingerprint.refusal({process: one["fingerprint"] for process, one in greetings.items()}, names)
    missing = [str(process) for process in range(place.count) if process not in greetings]
    if refusal or not missing:
        return refusal
    who = f"process {', '.join(missing)} of {place.count} has not arrived at {place.address}"
    return f"{who} within {seconds:g} s: {_CURE}"


def _arrive(
    place: Place, own: dict[str, Any], deadline: float, seconds: float
) -> tuple[dict[int, Connection], dict[int, str]]:
    """As `meet`, on any other process."""
    host, _, port = place.address.rpartition(":")
    reason = "nobody listens"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = _prompt(socket.create_connection((host.strip("[]"), int(port)), timeout=left))
        except OSError as error:
            reason = str(error)
            time.sleep(AGAIN)
            continue
        connection.send(**own)
        # Process 0 waits until all others are here. What else listens there may be what an earlier run has left.
        answer = connection.first(deadline + 5) or {}
        if "refusal" in answer:
            raise ValueError(answer["refusal"])
        if "names" in answer:
            return {0: connection}, dict(answer["names"])
        reason = "something else listens there, or process 0 has ended"
        connection.socket.close()
        time.sleep(AGAIN)
    who = f"process 0 has not answered process {place.process} at {place.address}"
    raise ValueError(f"{who} within {seconds:g} s ({reason}): {_CURE}")


def _prompt(connected: socket.socket) -> Connection:
    """A connection whose small messages do not wait for more to send."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected)


def _listener(place: Place) -> socket.socket:
    """A socket that listens at process 0's port, for IPv6 and IPv4 where there are both."""
    port = int(place.address.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {place.address} ({error.strerror}): an earlier run may still end there; wait, "
            "or give all processes another port in --coordinator_address"
        ) from error
