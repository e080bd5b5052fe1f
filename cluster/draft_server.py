"""The draft stage's end of the exchange: a drafter in a thread of its own behind a ZeroMQ socket.

Whoever knows the server's public key may ask; it is told through Ray alone. Frames are encrypted.
"""

import logging
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from ipaddress import ip_address

import zmq

from cluster.draft_frames import MAX_BYTES, pack_answers, unpack_asks
from engine.device import use_device
from engine.drafter import Drafter, DrafterStatus
from engine.drafts import Answer

IDLE_MILLISECONDS = 50  # until a closing server notices

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a draft server listens: a ZeroMQ address and the public key of its socket, Z85."""

    address: str
    key: str


class DraftServer:
    """Answers until closed. `error` says why it can answer no longer, `beat` when it last made a step or found nothing
    to do (time.monotonic)."""

    def __init__(self, drafter: Drafter, host: str) -> None:
        """host: the address of this node at which verifiers reach it. Raises zmq.ZMQError if it cannot be bound."""
        self.drafter = drafter
        self.error: str | None = None
        self.malformed = 0  # frames
        self.beat = time.monotonic()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        public, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_publickey, self._socket.curve_server = public, True
        self._socket.linger, self._socket.maxmsgsize = 0, MAX_BYTES
        self._socket.ipv6 = ip_address(host).version == 6
        self._socket.bind(f"tcp://[{host}]:*" if self._socket.ipv6 else f"tcp://{host}:*")
        self.endpoint = Endpoint(self._socket.getsockopt_string(zmq.LAST_ENDPOINT), public.decode())
        self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)
        self._thread.start()

    def status(self) -> DrafterStatus:
        return self.drafter.status()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        try:
            use_device(self.drafter.config.device)
            while not self._closing:
                self.beat = time.monotonic()
                self._receive(0 if not self.drafter.idle else IDLE_MILLISECONDS)
                if not self.drafter.idle:
                    self._send(self.drafter.step())
        except Exception as error:
            logger.exception("the drafter failed")
            self.error = f"the drafter failed: {error!r}"

    def _receive(self, milliseconds: int) -> None:
        """Takes in what has arrived, after waiting so long for a first frame."""
        while self._socket.poll(milliseconds):
            peer, *frames = self._socket.recv_multipart()
            milliseconds = 0
            try:
                [frame] = frames
                asks, dropped = unpack_asks(frame)
            except ValueError as error:  # a FrameError, or not one frame
                self.malformed += 1
                logger.warning("a frame that cannot be read is dropped: %s", error)
                continue
            for key in dropped:
                self.drafter.drop(peer, key)
            for ask in asks:
                self.drafter.add(peer, ask)

    def _send(self, answers: list[tuple[bytes, Answer]]) -> None:
        of: defaultdict[bytes, list[Answer]] = defaultdict(list)
        for peer, answer in answers:
            of[peer].append(answer)
        for peer, theirs in of.items():
            # one that has gone gets nothing, without an error
            self._socket.send_multipart([peer, pack_answers(theirs)])
