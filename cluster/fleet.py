"""What a process knows of the replicas that it sends requests to."""


class Fleet:
    """What this process has heard of a deployment's replicas, by their unique ids. Times in seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._heard: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._load: dict[str, int] = {}

    def hear(self, replica: str, now: float, leaving: bool = False, load: int | None = None) -> None:
        """A replica whose engine makes steps, or has none to make, has said so; or that it is about to leave. load: how
        many requests it has."""
        self._heard[replica] = now
        if load is not None:
            self._load[replica] = load
        if leaving:
            self._leaving.add(replica)

    def meet(self, replica: str, now: float) -> None:
        """A replica exists; its silence counts from the first time on."""
        self._heard.setdefault(replica, now)

    def keep(self, replicas: set[str]) -> None:
        """Forgets all others."""
        self._heard = {replica: heard for replica, heard in self._heard.items() if replica in replicas}
        self._load = {replica: load for replica, load in self._load.items() if replica in replicas}
        self._leaving &= replicas

    def take_load(self, replica: str) -> int | None:
        """How many requests a replica has said to have, once: whoever asks counts on from there."""
        return self._load.pop(replica, None)

    def usable(self, replica: str, now: float) -> bool:
        """Whether to send requests there."""
        return replica not in self._leaving and now - self._heard.get(replica, now) <= self._patience


# Of this process, by deployment. Serve makes the routers and shows them to nobody, so they find it here.
fleets: dict[str, Fleet] = {}
