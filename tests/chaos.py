"""Faults under load: a cluster whose processes are killed, stopped and ended, and a client that counts what it lost.

The client's journal is the oracle. A load is asked once without faults; its texts are the references, and since seeds
and modes make them deterministic in float32, every later answer to the same question must be the same, to the last
token, whatever happens to the server meanwhile.

`python tests/chaos.py` runs every fault against every shape of the server, prints the table and writes it down.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import httpx

from conftest import MARK, ServerProcess, free_port
from perf.timing import machine, write_report
from serve_app.config import AppConfig

ROOT = Path(__file__).parent.parent
HOST = Path(__file__).with_name("chaos_host.py")
POLL_SECONDS = 0.1
ANSWER_SECONDS = 300.0  # a request that takes longer is lost; half of what OpenAI's clients wait by default
MODES = ("auto", "ar", "linear_spec", "quadratic_spec", "diffusion")
LOSSLESS = MODES[:-1]
PROMPTS = (
    "Once upon a time",
    "The numbers are 4, 8,",
    "Sort these words: pear, apple,",
    "Q: What is 41 + 17? A:",
)
Role = Literal["engine", "rank", "draft", "ingress", "controller", "node"]


# --- the cluster ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    state: str  # as in /proc: T is stopped
    command: str


@dataclass(frozen=True, slots=True)
class Victim:
    """Whom a fault has hit: the processes, and the Serve replicas among them."""

    pids: frozenset[int]
    replicas: frozenset[str]
    ingresses: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A way to run the server: two engines behind two ingresses, and for a staged one two drafters."""

    tensor_parallel: int = 1
    staged: bool = False

    def __str__(self) -> str:
        return f"{'staged' if self.staged else 'colocated'}, TP {self.tensor_parallel}"

    @property
    def cpus(self) -> int:
        """What half of it takes, so that a node has room for just that: one for each replica, half a one for each of
        several ranks."""
        ranks = self.tensor_parallel if self.tensor_parallel > 1 else 0
        return 1 + self.staged + ranks // 2

    def config(self, port: int, heartbeat: float) -> AppConfig:
        """Short blocks, which cost a CPU less. heartbeat: seconds of silence after which an engine counts as hung."""
        raw: dict[str, Any] = {
            "engine": {"block_length": 8, "quadratic_block_length": 4},
            "server": {
                "port": port,
                "ingress_replicas": 2,
                "ingress_per_node": 1,
                "stream_interval_seconds": 0.05,
            },
            "serve": {"heartbeat_seconds": heartbeat, "start_seconds": 120, "drain_seconds": 30},
            "replicas": 2,
        }
        if self.tensor_parallel > 1:
            raw["engine"]["tensor_parallel"] = self.tensor_parallel
        if self.staged:
            raw |= {"topology": "staged", "draft": {"replicas": 2, "engine": {"tensor_parallel": 1}}}
        return AppConfig.model_validate(raw)


SHAPES = {str(shape): shape for shape in (Shape(), Shape(2), Shape(staged=True), Shape(2, staged=True))}


class ChaosCluster(ServerProcess):
    """A server on two Ray nodes of this machine, half of it on each."""

    def __init__(self, shape: Shape, heartbeat: float) -> None:
        super().__init__(free_port())
        self.shape = shape
        self.config = shape.config(self.port, heartbeat)
        self.expected: dict[str, int] = {}  # replicas by role, and ranks, once started
        self._asking = threading.Lock()
        self._complaints = tempfile.TemporaryFile("w+")  # Ray has much to say about what is done to it here

    def __enter__(self) -> "ChaosCluster":
        self.launch()
        try:
            self._read()
            for replica in self.replicas():
                self.expected[replica["role"]] = self.expected.get(replica["role"], 0) + 1
            self.expected["rank"] = len(self.pids("rank"))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The one proxy here is for all nodes; by itself it would use the ingress on its own node only.
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), self.config.model_dump_json(), json.dumps([self.shape.cpus] * 2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        """Ends every process, the stopped ones too."""
        self.process.send_signal(signal.SIGINT)  # SIGTERM would have the answers finished first
        self.process.communicate(timeout=30)
        self._complaints.close()
        assert self.processes() == {}

    def ask(self, command: str) -> Any:
        """What the cluster's owner answers; waits for a controller that is down."""
        assert self.process.stdin is not None
        with self._asking:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._complaints.seek(0)
            raise AssertionError(f"the cluster has ended:\n{self._complaints.read()[-5000:]}")
        return json.loads(line)

    def replicas(self) -> list[dict[str, Any]]:
        """Serve's replicas with role, id, pid and state; none while the controller cannot say."""
        answer = self.ask("replicas")
        return answer if isinstance(answer, list) else []

    def alive(self) -> dict[int, Process]:
        """All processes of this cluster that have not ended, by id."""
        found = {}
        for pid, command in self.processes().items():
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
            except OSError:
                continue
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            if state != "Z":
                found[pid] = Process(pid, int(parent), state, command)
        return found

    def subtree(self, pid: int) -> Iterator[int]:
        """A process and all that it has started."""
        yield pid
        for process in self.alive().values():
            if process.parent == pid:
                yield from self.subtree(process.pid)

    def pids(self, role: str) -> list[int]:
        pattern = PATTERNS[role]
        return sorted(pid for pid, process in self.alive().items() if re.search(pattern, process.command))

    def ready(self) -> dict[str, dict[str, Any]]:
        """What `/ready` says of each engine that answers, by the id of its replica."""
        try:
            reply = httpx.get(self.url + "/ready", timeout=10, trust_env=False)
        except httpx.TransportError:
            return {}
        return {each["replica"]: each for each in reply.json()["replicas"]} if reply.is_success else {}

    def strike(
        self, fault: "Fault", replicas: list[dict[str, Any]], ready: dict[str, dict[str, Any]]
    ) -> Victim:
        """Sends a signal to the busiest process of a role, or to a whole node but the head's. Asks nobody, which would
        take its time while the load goes by: `replicas` and `ready` are what these methods have said."""
        serving = {replica["pid"]: replica for replica in replicas}
        load = {name: each["running"] + each["waiting"] for name, each in ready.items()}

        def busy(pid: int) -> int:
            return load.get(serving[pid]["id"], 0) if pid in serving else 0

        chosen = max(self.pids(fault.role), key=busy)
        pids = frozenset(self.subtree(chosen) if fault.role == "node" else (chosen,))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, fault.number)
        hit = [serving[pid] for pid in pids if pid in serving]
        return Victim(
            pids,
            frozenset(replica["id"] for replica in hit),
            sum(replica["role"] == "ingress" for replica in hit),
        )

    def resume(self) -> None:
        """Lets stopped processes go on."""
        for process in self.alive().values():
            if process.state == "T":
                os.kill(process.pid, signal.SIGCONT)

    def whole(self, victim: Victim | None = None) -> bool:
        """Everybody runs who should, without the victim."""
        alive = self.alive()
        if victim is not None and victim.pids & alive.keys():
            return False
        running = {"rank": len(self.pids("rank"))}
        for replica in self.replicas():
            if replica["state"] == "RUNNING" and replica["pid"] in alive:
                running[replica["role"]] = running.get(replica["role"], 0) + 1
        ready = [each for each in self.ready().values() if not each["error"]]
        return (
            running == self.expected and len(ready) == self.config.replicas and bool(self.pids("controller"))
        )

    def idle(self) -> bool:
        """No engine has a request, and all pages are free."""
        ready = self.ready()
        return len(ready) > 0 and all(
            each["running"] == each["waiting"] == 0 and each["free_pages"] == each["total_pages"]
            for each in ready.values()
        )


PATTERNS = {
    "engine": r"^ray::ServeReplica:triserve:engine",
    "rank": r"^ray::RankWorker",
    "draft": r"^ray::ServeReplica:triserve:draft",
    "ingress": r"^ray::ServeReplica:triserve:ingress",
    "controller": r"^ray::ServeController",
    "node": r"/raylet/raylet (?!.*--head)",
}


# --- the load ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body["stream"])


def questions(count: int, tokens: int) -> list[Question]:
    """Every mode, streams and whole answers, mostly with a temperature. Each beginning is asked in every mode, so that
    the references of the lossless ones confirm each other."""
    asked = []
    for number in range(count):
        beginning, mode = number // len(MODES), MODES[number % len(MODES)]
        body: dict[str, Any] = {
            "prompt": PROMPTS[beginning % len(PROMPTS)],
            "mode": mode,
            "seed": beginning,
            "temperature": 0.0 if beginning % 4 == 3 else 1.0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": number % 3 != 2,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        asked.append(Question(body))
    return asked


@dataclass(slots=True)
class Record:
    """The client's journal of one request. Times are of the monotonic clock."""

    number: int  # of its question
    sent: float
    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0  # as usage counts them
    resumed: int = 0  # engines that the answer outlived, as usage says
    arrivals: list[float] = field(default_factory=list)
    ended: float | None = None
    error: str = ""
    cut: bool = False  # the connection broke, or whoever answered was not the application

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.sent

    @property
    def gap(self) -> float:
        """The longest wait between two chunks."""
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


class Load:
    """Asks questions in order, so many at a time, each over a connection of its own."""

    def __init__(self, url: str, asked: Sequence[Question], in_flight: int) -> None:
        self.records: list[Record] = []
        self._url = url
        self._asked = asked
        self._in_flight = in_flight

    async def run(self) -> list[Record]:
        """The journal, in the order of the questions, when every one has been answered or lost."""
        waiting = iter(enumerate(self._asked))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=None, limits=limits, trust_env=False
        ) as client:

            async def ask_on() -> None:
                for number, question in waiting:
                    await self._ask(client, number, question)

            await asyncio.gather(*(ask_on() for _ in range(self._in_flight)))
        return sorted(self.records, key=lambda record: record.number)

    @property
    def in_flight(self) -> list[Record]:
        return [record for record in self.records if record.ended is None]

    async def underway(self) -> None:
        """Returns when the load is in full swing: half of the streams in flight have begun, and some in every mode."""
        while True:
            begun = [record for record in self.in_flight if len(record.arrivals) > 2]
            streams = [record for record in self.in_flight if self._asked[record.number].stream]
            if len(self.in_flight) == self._in_flight and 2 * len(begun) >= len(streams):
                return
            assert len(self.records) < len(self._asked) or self.in_flight, "the load ended before the fault"
            await asyncio.sleep(0.01)

    async def _ask(self, client: httpx.AsyncClient, number: int, question: Question) -> None:
        record = Record(number, time.monotonic())
        self.records.append(record)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with client.stream("POST", "/v1/completions", json=question.body) as response:
                    record.status = response.status_code
                    if response.status_code != 200:
                        _read_refusal(record, await response.aread())
                    elif question.stream:
                        await _read_stream(record, response)
                    else:
                        _read_whole(record, json.loads(await response.aread()))
        except TimeoutError:
            record.error = f"no answer within {ANSWER_SECONDS} s"
        except httpx.TransportError as error:
            record.error, record.cut = repr(error), True
        finally:
            record.ended = time.monotonic()


def _read_refusal(record: Record, content: bytes) -> None:
    record.error = f"status {record.status}: {content[:300]!r}"
    record.cut = not content.startswith(b'{"error"')


def _read_whole(record: Record, body: dict[str, Any]) -> None:
    [choice] = body["choices"]
    record.text, record.finish_reason = choice["text"], choice["finish_reason"]
    _read_usage(record, body["usage"])


def _read_usage(record: Record, usage: dict[str, Any]) -> None:
    record.tokens = usage["completion_tokens"]
    record.resumed = usage["decode"].get("resumed", 0)


async def _read_stream(record: Record, response: httpx.Response) -> None:
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            record.error = str(event["error"])
        elif event.get("usage"):
            _read_usage(record, event["usage"])
        else:
            [choice] = event["choices"]
            record.arrivals.append(time.monotonic())
            record.text += choice["text"]
            record.finish_reason = choice["finish_reason"]
    record.error, record.cut = "the stream ended without [DONE]", True


# --- the oracle ----------------------------------------------------------------------------------------------------


class Reference:
    """What a load is answered without faults, and how long that takes."""

    def __init__(self, asked: Sequence[Question], records: Sequence[Record]) -> None:
        assert [record.error for record in records if record.error] == []
        self.asked = list(asked)
        self.records = list(records)
        for start in range(0, len(asked), len(MODES)):
            texts = {record.text for record in records[start : start + len(LOSSLESS)]}
            assert len(texts) == 1, f"the lossless modes disagree: {texts}"

    def complaint(self, record: Record) -> str:
        """What is wrong with an answer that has come; "" if it is the reference."""
        expected = self.records[record.number]
        if record.text != expected.text:
            same = len(os.path.commonprefix([record.text, expected.text]))
            return (
                f"{self.asked[record.number].body['mode']}: {len(record.text)} characters for {len(expected.text)}, "
                f"different from {same}: {record.text[same : same + 20]!r} for {expected.text[same : same + 20]!r}"
            )
        if (record.finish_reason, record.tokens) != (expected.finish_reason, expected.tokens):
            return f"ended by {record.finish_reason} with {record.tokens} tokens, not {expected.tokens}"
        return ""


async def reference(cluster: ChaosCluster, asked: Sequence[Question], in_flight: int) -> Reference:
    return Reference(asked, await Load(cluster.url, asked, in_flight).run())


# --- faults --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to a process of some role; in a staged server the engines are the verifiers."""

    role: Role
    number: signal.Signals

    def __str__(self) -> str:
        how = {signal.SIGKILL: "killed", signal.SIGSTOP: "hung", signal.SIGTERM: "terminated"}
        return f"{self.role} {how[self.number]}"

    def applies(self, shape: Shape) -> bool:
        return {"rank": shape.tensor_parallel > 1, "draft": shape.staged}.get(self.role, True)


FAULTS = {
    str(fault): fault
    for fault in (
        Fault("engine", signal.SIGKILL),
        Fault("engine", signal.SIGTERM),
        Fault("engine", signal.SIGSTOP),
        Fault("rank", signal.SIGKILL),
        Fault("rank", signal.SIGSTOP),
        Fault("draft", signal.SIGKILL),
        Fault("draft", signal.SIGSTOP),
        Fault("controller", signal.SIGKILL),
        Fault("ingress", signal.SIGKILL),
        Fault("node", signal.SIGKILL),
    )
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault under one load. Times in seconds."""

    fault: str
    shape: str  # of the server
    requests: int
    in_flight: int  # at the fault
    on_victim: int  # sequences of engines that were hit
    resumed: int  # answers that another engine continued
    lost: int  # no answer, or an error
    wrong: int  # tokens missing, doubled or different
    sockets: int  # connections that broke because their own ingress had died
    added_p95: float  # to an answer's time, against the same load without a fault
    longest_gap: float  # between two chunks of a stream
    whole_after: float | None  # until every replica ran again; None: not waited for
    complaints: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.lost == self.wrong == 0


async def trial(
    cluster: ChaosCluster, fault: Fault, expected: Reference, in_flight: int, *, wait: float = 0.0
) -> Outcome:
    """Inflicts a fault on a cluster that answers a load. With `wait` (seconds), hung processes stay so until the server
    has replaced them, or for so long; otherwise they go on when the load has ended."""
    replicas = await asyncio.to_thread(cluster.replicas)
    load = Load(cluster.url, expected.asked, in_flight)
    run = asyncio.create_task(load.run())
    await load.underway()
    before = await asyncio.to_thread(cluster.ready)
    victim = await asyncio.to_thread(cluster.strike, fault, replicas, before)
    struck = time.monotonic()
    hit = load.in_flight
    assert hit, "the load ended before the fault"
    recovery = asyncio.create_task(_recovery(cluster, fault, victim, wait)) if wait else None
    records = await run
    whole_at = await recovery if recovery is not None else None
    cluster.resume()
    gone = before.keys() - (await asyncio.to_thread(cluster.ready)).keys()

    lost = [record for record in records if record.error and not (record.cut and victim.ingresses)]
    cut = [record for record in records if record.cut and victim.ingresses]
    answered = [record for record in records if not record.error]
    wrong = {record.number: text for record in answered if (text := expected.complaint(record))}
    added = [record.seconds - expected.records[record.number].seconds for record in answered]
    late = [f"cut, although sent after the fault: {r.error}" for r in cut if r.sent > struck]
    return Outcome(
        fault=str(fault),
        shape=str(cluster.shape),
        requests=len(records),
        in_flight=len(hit),
        on_victim=sum(
            before[name]["running"] + before[name]["waiting"]
            for name in gone | (victim.replicas & before.keys())
        ),
        resumed=sum(record.resumed > 0 for record in answered),
        lost=len(lost) + len(late),
        wrong=len(wrong),
        sockets=len(cut),
        added_p95=round(quantiles(added, n=20)[-1], 2),
        longest_gap=round(max(record.gap for record in answered), 2),
        whole_after=None if whole_at is None else round(whole_at - struck, 1),
        complaints=(*(f"{record.number}: {record.error}" for record in lost), *wrong.values(), *late),
    )


async def _recovery(cluster: ChaosCluster, fault: Fault, victim: Victim, seconds: float) -> float | None:
    """When the cluster was whole again, a lost node being replaced at once; None if it was not in time."""
    if fault.role == "node":
        await asyncio.to_thread(cluster.ask, "add_node")
    try:
        return await _until(lambda: cluster.whole(victim), seconds)
    except TimeoutError:
        return None


async def settled(cluster: ChaosCluster, seconds: float = 60.0) -> None:
    """Returns when every replica runs and nothing is left of any load."""
    await _until(lambda: cluster.whole() and cluster.idle(), seconds)


async def _until(what: Callable[[], bool], seconds: float) -> float:
    """When it became true. Raises TimeoutError if it does not."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(what):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds} s")
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic()


# --- every fault ---------------------------------------------------------------------------------------------------


async def series(
    cluster: ChaosCluster, faults: Sequence[Fault], in_flight: int, tokens: int
) -> list[Outcome]:
    """One trial after the other on one cluster, each from full capacity, each row printed as it comes."""
    expected = await reference(cluster, questions(in_flight + in_flight // 4, tokens), in_flight)
    outcomes = []
    for fault in faults:
        await settled(cluster)
        outcomes.append(await trial(cluster, fault, expected, in_flight, wait=120.0))
        print(row(outcomes[-1]), *outcomes[-1].complaints, sep="\n", flush=True)
    await settled(cluster)
    return outcomes


HEADER = (
    "fault", "server", "in flight", "on the victim", "resumed", "lost", "wrong", "connections cut",
    "added p95 (s)", "longest gap (s)", "whole after (s)",
)  # fmt: skip


def row(outcome: Outcome) -> str:
    cells = (
        outcome.fault, outcome.shape, outcome.in_flight, outcome.on_victim, outcome.resumed, outcome.lost,
        outcome.wrong, outcome.sockets, outcome.added_p95, outcome.longest_gap, outcome.whole_after or "never",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every fault against every shape of the server.")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--heartbeat", type=float, default=5.0, help="serve.heartbeat_seconds")
    parser.add_argument("--output", type=Path, help="where the outcomes are written as JSON")
    options = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|", sep="\n", flush=True)
    outcomes: list[Outcome] = []
    for name in options.shape or SHAPES:
        chosen = [FAULTS[fault] for fault in options.fault or FAULTS if FAULTS[fault].applies(SHAPES[name])]
        with ChaosCluster(SHAPES[name], options.heartbeat) as cluster:
            outcomes += asyncio.run(series(cluster, chosen, options.in_flight, options.tokens))
        report = {
            "machine": machine() | {"ray": version("ray")},
            "heartbeat_seconds": options.heartbeat,
            "load": {"in_flight": options.in_flight, "tokens": options.tokens, "modes": MODES},
            "in_flight": sum(outcome.in_flight for outcome in outcomes),
            "lost": sum(outcome.lost for outcome in outcomes),
            "wrong": sum(outcome.wrong for outcome in outcomes),
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        write_report(options.output, report)
    exact = all(outcome.exact and outcome.whole_after is not None for outcome in outcomes)
    print(
        f"{report['in_flight']} requests in flight at a fault: {report['lost']} lost, {report['wrong']} wrong"
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
