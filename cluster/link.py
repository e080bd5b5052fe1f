"""How an engine and its ranks talk: ZeroMQ messages of a kind and a body. Knows nothing of what is in them.

The engine's end binds; a rank connects and presents the group's token, or nothing it says is heard.
"""

import hmac
import secrets

import zmq

HELLO = b"hello"
MAX_BYTES = 64 * 2**20  # of a message from a rank
CLOSE_MS = 1000  # what a last word gets to arrive


class Hub:
    """The engine's end, on a port of its own. One thread at a time may use it."""

    def __init__(self, host: str, ranks: int) -> None:
        """host: the address of this node under which its ranks reach it."""
        self.ranks, self.token = ranks, secrets.token_hex(32)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # what cannot be delivered raises
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        self._socket.setsockopt(zmq.LINGER, CLOSE_MS)
        own = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        self.address = f"{own}:{self._socket.bind_to_random_port(own)}"
        self._known: dict[bytes, int] = {}  # rank of each connection whose hello was right
        self._listening: dict[int, bytes] = {}  # connection on which each rank waits for messages

    @property
    def met(self) -> set[int]:
        """The ranks that have said hello."""
        return set(self._known.values())

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Sends to all ranks, which must have said hello. Raises ConnectionError if one is gone."""
        for rank in range(self.ranks):
            try:
                self._socket.send_multipart([self._listening[rank], kind, body], copy=False)
            except zmq.ZMQError as error:
                raise ConnectionError(f"rank {rank} cannot be reached: {error}") from error

    def receive(self, seconds: float) -> tuple[int, bytes, bytes] | None:
        """The next message of a rank, with its number; None if none comes in time, or something else does, so that no
        stranger can keep the caller here."""
        if not self._socket.poll(int(1000 * seconds)):
            return None
        connection, *parts = self._socket.recv_multipart()
        if connection not in self._known:
            self._greet(connection, parts)
            return None
        return (self._known[connection], parts[0], parts[1]) if len(parts) == 2 else None

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _greet(self, connection: bytes, parts: list[bytes]) -> None:
        """Gets to know a rank. Whoever does not know the token stays a stranger."""
        if len(parts) != 4 or parts[0] != HELLO or not hmac.compare_digest(parts[1], self.token.encode()):
            return
        if not parts[2].isdigit() or len(parts[2]) > 4 or int(parts[2]) >= self.ranks:
            return
        rank = int(parts[2])
        if parts[3] == b"1":
            if rank in self._listening:
                return
            self._listening[rank] = connection
        self._known[connection] = rank


class Spoke:
    """A rank's end. Each thread that speaks has its own; one of them listens."""

    def __init__(self, address: str, token: str, rank: int, listens: bool) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, CLOSE_MS)
        self._socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))
        self._socket.connect(address)
        self._socket.send_multipart([HELLO, token.encode(), str(rank).encode(), b"1" if listens else b"0"])

    def send(self, kind: bytes, body: bytes = b"") -> None:
        self._socket.send_multipart([kind, body])

    def receive(self) -> tuple[bytes, bytes]:
        """Waits for the next message of the engine."""
        kind, body = self._socket.recv_multipart()
        return kind, body

    def close(self) -> None:
        self._socket.close()
        self._context.term()
