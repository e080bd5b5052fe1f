"""What is needed to continue an answer elsewhere, and how often that is worth it. Pure bookkeeping."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.request import DecodeStats, Request
from serve_app.chunks import Chunk

SUSPECT = 4  # suspicion from which on a request runs alone
RAN = 2  # suspicion for each engine that died under a running request
WAITED = 1  # for each that died while the request waited: it may have started a moment ago


class Journal:
    """Follows one answer across engines.

    An engine that dies may have been killed by what it served. A request that ran in two that died, or waited in four,
    goes on on probation: alone, so that nobody else is lost with it. If that engine dies too, while the request ran,
    the request is given up.
    """

    def __init__(self, request: Request) -> None:
        self.resumed = 0  # engines that the answer outlived
        self._request = request
        self._tokens = list(request.generated)
        self._suspicion = 0
        self._accepted = False
        self._chunk: Chunk | None = None  # the last one of the present engine
        self._before = DecodeStats()  # of engines that handed the request over

    @property
    def alone(self) -> bool:
        return self._suspicion >= SUSPECT

    @property
    def accepted(self) -> bool:
        """Whether any engine has had the request."""
        return self._accepted

    def request(self) -> Request:
        """What to ask of the next engine."""
        self._chunk = None
        return dataclasses.replace(self._request, generated=tuple(self._tokens), alone=self.alone)

    def record(self, chunk: Chunk) -> Chunk:
        """Notes a chunk; returns it as the client is to see it."""
        self._chunk, self._accepted = chunk, True
        self._tokens += chunk.token_ids
        if chunk.stats is None:
            return chunk
        stats = _sum(self._before, chunk.stats)
        return chunk._replace(stats=dataclasses.asdict(dataclasses.replace(stats, resumed=self.resumed)))

    def moved(self) -> None:
        """The engine has handed the request over."""
        assert self._chunk is not None
        if self._chunk.stats is not None:  # else it never was in the engine
            self.resumed += 1
            self._before = _sum(self._before, self._chunk.stats)

    def lost(self) -> bool:
        """The engine died, or makes no steps any more. Returns whether the request may continue on another."""
        if self._chunk is None:
            return True  # it never had the request
        self.resumed += 1
        if self.alone:
            return not self._chunk.running
        self._suspicion += RAN if self._chunk.running else WAITED
        return True


def _sum(before: DecodeStats, stats: Mapping[str, Any]) -> DecodeStats:
    """Counters added up; what the cache had for the prompt is the first engine's."""
    after = DecodeStats(**stats)
    if not before.modes:
        return after
    added = {
        field.name: getattr(before, field.name) + getattr(after, field.name)
        for field in dataclasses.fields(DecodeStats)
    }
    added["modes"] = tuple(dict.fromkeys(added["modes"]))
    return DecodeStats(**added | {"cached_tokens": before.cached_tokens})
