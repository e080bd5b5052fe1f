"""The verify stage's end of the exchange: a source of drafts that asks draft servers over ZeroMQ.

A sequence stays with the server that knows its text. When that server has gone, or is silent, the sequence goes to the
one with the fewest, which is told its tokens anew.
"""

import logging
import math
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from queue import SimpleQueue

import zmq

from cluster.draft_frames import MAX_BYTES, pack_asks, unpack_answers
from cluster.draft_server import Endpoint
from engine.drafts import Answer, Ask, Verdict

SILENT_SECONDS = 2.0  # that a server may leave asks without any answer
FRAME_TOKENS = 1 << 20  # after which another frame begins
RETRY_SECONDS = 2.0  # until a server that was silent, or could not be reached, is asked again

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Server:
    socket: "zmq.Socket[bytes]"
    keys: set[int] = field(default_factory=set)  # of its sequences
    # by key, until answered: the last ask's number, and when the first one was sent that has had no answer
    asked: dict[int, tuple[int, float]] = field(default_factory=dict)
    heard: float = 0.0
    shunned_until: float = 0.0

    def silent(self, now: float) -> bool:
        if not self.asked:
            return False
        return now - max(self.heard, min(since for _, since in self.asked.values())) > SILENT_SECONDS


class RemoteDrafts:
    """A DraftSource, called by the engine's thread, but for `use`."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._public, self._secret = zmq.curve_keypair()
        self._servers: dict[Endpoint, _Server] = {}
        self._wanted: frozenset[Endpoint] = frozenset()
        self._connected: SimpleQueue[tuple[Endpoint, _Server]] = SimpleQueue()  # on their way into `_servers`
        self._homes: dict[int, _Server] = {}  # by key
        self._unsent: list[Answer] = []  # to asks that nobody got

    def use(self, endpoints: Iterable[Endpoint]) -> None:
        """Says which servers there are now, and connects to new ones. One thread calls it, not the engine's."""
        wanted, before = frozenset(endpoints), self._wanted
        self._wanted = wanted  # first, or the engine's thread might take a new one for one that has gone
        for endpoint in wanted - before:
            self._connected.put((endpoint, self._connect(endpoint)))

    def send(self, asks: Seq[Ask], dropped: Seq[int]) -> None:
        now = time.monotonic()
        self._follow(now)
        batches: dict[_Server, tuple[list[Ask], list[int]]] = {}
        for key in dropped:
            server = self._homes.pop(key, None)
            if server is not None:
                server.keys.discard(key)
                server.asked.pop(key, None)
                batches.setdefault(server, ([], []))[1].append(key)
        for ask in asks:
            known = self._homes.get(ask.key)
            server = known or self._pair(ask.key, now)
            if server is None:
                self._unsent.append(Answer(ask.key, ask.number, Verdict.DECLINED))
            elif known is None and len(ask.tokens) < ask.position:
                self._unsent.append(Answer(ask.key, ask.number, Verdict.FORGOTTEN))
            else:
                batches.setdefault(server, ([], []))[0].append(ask)
        for server, (theirs, gone) in batches.items():
            for ask in theirs:
                _, since = server.asked.get(ask.key, (0, now))
                server.asked[ask.key] = ask.number, since
            try:
                for part in _parts(theirs) or [[]]:
                    server.socket.send(pack_asks(part, gone), zmq.NOBLOCK)
            except zmq.Again:  # not connected, or not reading
                self._unsent += [Answer(ask.key, ask.number, Verdict.FORGOTTEN) for ask in theirs]
                self._shun(server, now)

    def poll(self) -> list[Answer]:
        now, answers, self._unsent = time.monotonic(), self._unsent, []
        servers = {server.socket: server for server in self._servers.values()}
        for socket, _ in self._poller.poll(0):
            server = servers[socket]
            server.heard = now
            for answer in _received(server.socket):
                # whatever else comes is late, or no answer to anything that this server was asked
                number, _ = server.asked.get(answer.key, (None, now))
                if number == answer.number:
                    del server.asked[answer.key]
                    answers.append(answer)
        return answers

    def wait(self, seconds: float) -> None:
        if not self._unsent:
            self._poller.poll(math.ceil(1000 * seconds))

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _follow(self, now: float) -> None:
        """Takes up new servers and leaves those that have gone or are silent."""
        wanted = self._wanted
        for endpoint in [endpoint for endpoint in self._servers if endpoint not in wanted]:
            self._leave(endpoint, now)
        while not self._connected.empty():
            endpoint, server = self._connected.get()
            if endpoint in self._servers:  # it went and came back
                self._leave(endpoint, now)
            self._servers[endpoint] = server
            self._poller.register(server.socket, zmq.POLLIN)
        for endpoint, server in self._servers.items():
            if server.silent(now):
                logger.warning("%s has been silent for %.1f s", endpoint.address, SILENT_SECONDS)
                self._shun(server, now)

    def _connect(self, endpoint: Endpoint) -> _Server:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.curve_serverkey = endpoint.key.encode()
        # nothing is kept for a server that cannot be reached: its sequences are another's by then
        socket.linger, socket.maxmsgsize, socket.ipv6, socket.immediate = 0, MAX_BYTES, True, True
        socket.connect(endpoint.address)
        return _Server(socket)

    def _leave(self, endpoint: Endpoint, now: float) -> None:
        server = self._servers.pop(endpoint)
        self._shun(server, now)
        self._poller.unregister(server.socket)
        server.socket.close()

    def _pair(self, key: int, now: float) -> _Server | None:
        """Gives a sequence to the server that has the fewest; None if there is none."""
        servers = [server for server in self._servers.values() if server.shunned_until <= now]
        server = min(servers, key=lambda server: len(server.keys), default=None)
        if server is not None:
            server.keys.add(key)
            self._homes[key] = server
        return server

    def _shun(self, server: _Server, now: float) -> None:
        for key in server.keys:
            del self._homes[key]
        server.keys.clear()
        server.asked.clear()
        server.shunned_until = now + RETRY_SECONDS


def _parts(asks: list[Ask]) -> list[list[Ask]]:
    """The asks in frames: many whole texts at once, as when a server is lost, do not fit into one."""
    parts: list[list[Ask]] = []
    room = 0
    for ask in asks:
        if not parts or len(ask.tokens) > room:
            parts.append([])
            room = FRAME_TOKENS
        parts[-1].append(ask)
        room -= len(ask.tokens)
    return parts


def _received(socket: "zmq.Socket[bytes]") -> list[Answer]:
    answers: list[Answer] = []
    while True:
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return answers
        try:
            [frame] = frames
            answers += unpack_answers(frame)
        except ValueError as error:  # a FrameError, or not one frame
            logger.warning("a frame that cannot be read is dropped: %s", error)
