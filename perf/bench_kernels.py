"""The kernels beside what one would use without them, and what they compile to.

Run: `python -m perf.bench_kernels`, or `--compile-only` on any machine.

Both sides run in this process and take turns, in CUDA graphs where they can be captured, on inputs that no cache
holds (`perf/timing.py`). The roofline is the bandwidth of a plain sum, or the rate of a large matrix product, measured
in the same run. Without CUDA the torch references run in the kernels' place, at shapes that a CPU manages: this shows
that the benchmark runs, and how the references compare, and nothing about the kernels.

`--compile-only` compiles what the engine launches (`perf/launches.py`) for GPUs that need not be there. It fails where
a build spills, takes too many registers or too much shared memory, or lacks its tensor cores, and where a kernel is
missing from the launches or from the record, perf/results/kernels.json. A drift from the record is reported.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from engine.batch import Layout, known_layout
from engine.config import ModelConfig
from kernels import attention, backend
from kernels.attention import Ragged, plan_attention, ragged_attention
from kernels.backend import on_triton
from kernels.commit import commit
from kernels.linear import linear
from kernels.sampling import Sampling
from kernels.settle import settle
from kernels.verify import accepted
from kernels.vocabulary import choose
from perf.compiled import ARCHITECTURES, compile_all, drift, missing
from perf.geometry import geometry
from perf.launches import all_launches, default_launches
from perf.steps import denoise_step, verify_step
from perf.timing import (
    Call,
    machine,
    matmul_rate,
    nbytes,
    read_bandwidth,
    rotations,
    side_by_side,
    write_report,
)

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "kernels.json"
PAGE = 64
EAGER = (
    "torch, read by the host",
    "flex + its mask",
)  # sides that no graph can hold, since the host takes part


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; seconds of one call."""

    suite: str
    shape: str
    other: str
    ours: float
    theirs: float | None  # None: the other side cannot run here
    floor: float | None  # what the measured copy bandwidth or product rate allows
    bar: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.theirs / self.ours

    @property
    def share(self) -> float | None:
        """Of the roofline."""
        return None if self.floor is None else self.floor / self.ours


class Machine(NamedTuple):
    """Where the benchmark runs and what it measured there."""

    device: torch.device
    dtype: torch.dtype
    geometry: ModelConfig
    bandwidth: float  # bytes per second
    rate: float  # floating-point operations per second
    repeats: int


class Part(NamedTuple):
    """Segments of a batch that are alike."""

    segments: int
    length: int  # query tokens, at least
    context: int
    pattern: str = "causal"  # or block, or quadratic, whose length is that of its block


class Batch:
    """Queries and a filled KV memory, and the same with keys and values gathered and padded, for others."""

    def __init__(self, parts: Sequence[Part], here: Machine) -> None:
        device, shape = here.device, here.geometry
        lengths, contexts, upto, lo, hi = [], [], [], [], []
        for part in parts:
            see = visibility(part)
            for _ in range(part.segments):
                lengths.append(len(see))
                contexts.append(part.context)
                upto += [row[0] for row in see]
                lo += [row[1] for row in see]
                hi += [row[2] for row in see]
        self.lengths, self.contexts = lengths, contexts
        self.keys = [context + length for context, length in zip(contexts, lengths, strict=True)]
        count, columns = len(lengths), -(-max(self.keys) // PAGE)

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        pages = torch.randperm(count * columns, device=device).view(count, columns)
        length = ints(lengths)
        self.ragged = Ragged(
            first=length.cumsum(0) - length,
            length=length,
            context=ints(contexts),
            row=torch.arange(count, device=device),
            open=ints([part.pattern != "causal" for part in parts for _ in range(part.segments)]).bool(),
            upto=ints(upto),
            lo=ints(lo),
            hi=ints(hi),
            pages=F.pad(pages, (0, 1)),
            lengths=lengths,
        )
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.q = torch.randn(sum(lengths), heads, dim, device=device, dtype=here.dtype)
        self.kv = torch.randn(count * columns, PAGE, 2 * kv_heads, dim, device=device, dtype=here.dtype)
        self.index = pages  # [S, columns]
        self.kv_bytes = sum(self.keys) * 2 * kv_heads * dim * self.kv.element_size()
        self.flops = 4 * heads * dim * sum(k * n for k, n in zip(self.keys, lengths, strict=True))
        self.padded_q = torch.zeros(count, max(lengths), heads, dim, device=device, dtype=here.dtype)
        for index, rows in enumerate(torch.split(self.q, lengths)):
            self.padded_q[index, : len(rows)] = rows
        self.padded_q = self.padded_q.transpose(1, 2)
        self.visible = self._visible()

    def _visible(self) -> Tensor:
        """[S, 1, longest segment, most keys] bool."""
        ragged, device = self.ragged, self.q.device
        assert ragged.lo is not None and ragged.hi is not None
        key = torch.arange(self.index.shape[1] * PAGE, device=device)
        seen = torch.zeros(len(self.lengths), 1, max(self.lengths), len(key), dtype=torch.bool, device=device)
        for index, (first, length, context) in enumerate(
            zip(ragged.first.tolist(), self.lengths, self.contexts, strict=True)
        ):
            upto, lo, hi = (x[first : first + length, None] for x in (ragged.upto, ragged.lo, ragged.hi))
            own = key - context
            seen[index, 0, :length] = (own < upto) | ((own >= lo) & (own < hi))
        return seen

    def gather(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [S, kv_heads, most keys, head_dim] each."""
        kv_heads = self.kv.shape[2] // 2
        held = self.kv[self.index].flatten(1, 2).transpose(1, 2)
        return held[:, :kv_heads], held[:, kv_heads:]

    def sdpa(self, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.padded_q, k, v, self.visible, enable_gqa=True)


def visibility(part: Part) -> list[tuple[int, int, int]]:
    """(upto, lo, hi) of each query token of one segment."""
    if part.pattern == "block":
        return [(part.length, 0, 0)] * part.length
    causal = [(token + 1, 0, 0) for token in range(part.length)]
    if part.pattern == "causal":
        return causal
    block = part.length
    groups = [
        (group + 1, block * (group + 1), block * (group + 2)) for group in range(block) for _ in range(block)
    ]
    return causal + groups


def ours_on(batch: Batch, here: Machine, exact: bool = False) -> Call:
    """The op with the plan made before, as layers share it."""
    shape = here.geometry
    plan = plan_attention(
        batch.ragged, PAGE, shape.num_heads, shape.num_kv_heads, shape.head_dim, here.dtype, exact=exact
    )
    return lambda: ragged_attention(batch.q, batch.kv, plan)


def attention_shapes(cuda: bool) -> dict[str, list[Part]]:
    if not cuda:
        return {
            "S=1 q=32 ctx 512": [Part(1, 32, 512, "block")],
            "S=1 q=1 ctx 512": [Part(1, 1, 512)],
            "mixed": [Part(4, 1, 100), Part(2, 48, 70), Part(4, 8, 130, "block")],
            "quadratic B=4": [Part(1, 4, 256, "quadratic")],
        }
    return {
        "S=1 q=32 ctx 4k": [Part(1, 32, 4096, "block")],
        "S=1 q=32 ctx 32k": [Part(1, 32, 32768, "block")],
        "S=1 q=32 ctx 128k": [Part(1, 32, 131072, "block")],
        "S=1 q=1 ctx 4k": [Part(1, 1, 4096)],
        "S=1 q=1 ctx 32k": [Part(1, 1, 32768)],
        "S=8 q=32 ctx 4k": [Part(8, 32, 4096, "block")],
        "S=64 q=8 ctx 2k": [Part(64, 8, 2048, "block")],
        "4 AR, 2 prefill of 512, 4 drafts, ctx 4k": [
            Part(4, 1, 4096), Part(2, 512, 4096), Part(4, 32, 4096, "block")
        ],
        "quadratic B=16 ctx 4k": [Part(1, 16, 4096, "quadratic")],
    }  # fmt: skip


def a1(here: Machine) -> Iterator[Row]:
    """Paged ragged attention beside torch's attention on padded batches."""
    cuda = here.device.type == "cuda"
    flexible = (
        ("S=1 q=32 ctx 32k", "S=8 q=32 ctx 4k") if cuda else ("S=1 q=32 ctx 512",)
    )  # compiling takes long
    for shape, parts in attention_shapes(cuda).items():
        first = Batch(parts, here)
        batches = [first, *(Batch(parts, here) for _ in range(rotations(first.kv_bytes, here.device) - 1))]
        gathered = [batch.gather() for batch in batches]
        sides: dict[str, list[Call]] = {
            "ours": [ours_on(batch, here) for batch in batches],
            "sdpa": [lambda b=b, k=k, v=v: b.sdpa(k, v) for b, (k, v) in zip(batches, gathered, strict=True)],  # type: ignore[misc]
            "gather + sdpa": [lambda b=b: b.sdpa(*b.gather()) for b in batches],  # type: ignore[misc]
        }
        if shape in flexible:
            sides["flex"] = [
                flexed(b, k, v, cuda, rebuild=False) for b, (k, v) in zip(batches, gathered, strict=True)
            ]
            sides["flex + its mask"] = [
                flexed(b, k, v, cuda, rebuild=True) for b, (k, v) in zip(batches, gathered, strict=True)
            ]
        check_attention(first, sides["ours"][0](), sides["sdpa"][0]())
        floor = max(first.kv_bytes / here.bandwidth, first.flops / here.rate)
        bar = {"S=1 q=32 ctx 32k": "60 %, 4 x sdpa", "S=1 q=32 ctx 128k": "75 %", "S=64 q=8 ctx 2k": "75 %",
               "S=1 q=32 ctx 4k": "14 us", "S=1 q=1 ctx 4k": "14 us"}.get(shape, "")  # fmt: skip
        yield from compared("A1", shape, sides, floor, bar, here)


@cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention)


def flexed(batch: Batch, k: Tensor, v: Tensor, compiled: bool, rebuild: bool) -> Call:
    """FlexAttention with a block mask made before, or at every call."""
    attend = compiled_flex() if compiled else flex_attention

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return batch.visible[b, 0, query, key]

    def mask() -> Any:
        _, _, queries, keys = batch.visible.shape
        return create_block_mask(visible, len(batch.lengths), None, queries, keys, device=str(k.device))

    made = mask()
    return lambda: attend(batch.padded_q, k, v, block_mask=mask() if rebuild else made, enable_gqa=True)


def check_attention(batch: Batch, ours: object, padded: object) -> None:
    """Raises AssertionError where the two sides do not compute the same."""
    assert isinstance(ours, Tensor) and isinstance(padded, Tensor)
    rows = [padded[index, :, :length].transpose(0, 1) for index, length in enumerate(batch.lengths)]
    tolerance = 2e-2 if ours.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.view_as(batch.q), torch.cat(rows), atol=tolerance, rtol=tolerance)


def compared(
    suite: str, shape: str, sides: dict[str, list[Call]], floor: float | None, bar: str, here: Machine
) -> Iterator[Row]:
    """Times the sides; a row for each of the others. Raises RuntimeError if ours fails."""
    timings = side_by_side(sides, here.device, here.repeats, EAGER)
    ours = timings.pop("ours")
    if ours.seconds is None:
        raise RuntimeError(f"{suite} {shape}: {ours.note}")
    if here.device.type != "cuda":  # where caches hold everything, and the bars are a GPU's
        floor, bar = None, ""
    for other, timing in timings.items():
        yield Row(suite, shape, other, ours.seconds, timing.seconds, floor, bar, timing.note)


def a2(here: Machine) -> Iterator[Row]:
    """32 query tokens in tiles of 16 beside tiles of 4, the kernel otherwise the same."""
    shape, parts = own_shapes(here)[0]
    batches = [Batch(parts, here) for _ in range(2)]

    def fewer_rows(batch: Batch) -> Call:
        groups = here.geometry.num_heads // here.geometry.num_kv_heads
        with patch.object(attention, "ROWS", 4 * groups):
            run = ours_on(batch, here)

        def call() -> object:
            with patch.object(attention, "ROWS", 4 * groups):
                return run()

        return call

    sides: dict[str, list[Call]] = {
        "ours": [ours_on(batch, here) for batch in batches],
        "tiles of 4 tokens": [fewer_rows(batch) for batch in batches],
    }
    floor = batches[0].kv_bytes / here.bandwidth
    yield from compared("A2", shape, sides, floor, "1.5 x", here)


def a3(here: Machine) -> Iterator[Row]:
    """Depths of the prefetch and lengths of the pieces, the kernel otherwise the same."""
    for shape, parts in own_shapes(here):
        batches = [Batch(parts, here) for _ in range(2)]
        sides: dict[str, list[Call]] = {"ours": [ours_on(batch, here) for batch in batches]}
        for stages in (2, 3, 4, 5):
            sides[f"{stages} stages"] = [staged(ours_on(batch, here), stages) for batch in batches]
        for shortest in (256, 512, 1024):
            with patch.object(attention, "SHORTEST", shortest):
                sides[f"pieces of {shortest} keys at least"] = [ours_on(batch, here) for batch in batches]
        yield from compared("A3", shape, sides, batches[0].kv_bytes / here.bandwidth, "", here)


def own_shapes(here: Machine) -> list[tuple[str, list[Part]]]:
    if here.device.type != "cuda":
        return [("S=1 q=8 ctx 130", [Part(1, 8, 130, "block")])]
    return [
        ("S=1 q=32 ctx 32k", [Part(1, 32, 32768, "block")]),
        ("S=64 q=8 ctx 2k", [Part(64, 8, 2048, "block")]),
    ]


def staged(run: Call, stages: int) -> Call:
    """The call with another depth of the prefetch."""

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if "STAGES" in options:
            options |= {"STAGES": stages, "num_stages": stages}
        backend.launch(kernel, grid, *args, **options)

    def call() -> object:
        with patch.object(attention, "launch", launch):
            return run()

    return call


def s1(here: Machine) -> Iterator[Row]:
    """The choice of tokens from logits beside softmax and max, or a draw from it."""
    vocab = here.geometry.vocab_size
    for rows in (32, 512, 2048) if here.device.type == "cuda" else (32,):
        for dtype in dict.fromkeys((here.dtype, torch.float32)):  # the engine's logits are float32
            size = rows * vocab * dtype.itemsize
            copies = min(rotations(size, here.device), max(2, 2**33 // size))
            logits = [torch.randn(rows, vocab, device=here.device, dtype=dtype) for _ in range(copies)]
            for name, sampling, other in (
                ("greedy", parameters(rows, here.device), softmax_max),
                ("sampled", parameters(rows, here.device, temperature=1.0), softmax_multinomial),
                (
                    "top-k 50, top-p 0.9",
                    parameters(rows, here.device, 1.0, 50, 0.9),
                    topk_softmax_multinomial,
                ),
            ):
                sides: dict[str, list[Call]] = {
                    "ours": [chosen(x, sampling, name) for x in logits],
                    other.__name__.replace("_", " + "): [lambda x=x, f=other: f(x) for x in logits],  # type: ignore[misc]
                }
                shape = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}, {name}"
                bar = "8 x" + (", 70 %" if rows == 2048 else "") if name == "greedy" else ""
                yield from compared("S1", shape, sides, size / here.bandwidth, bar, here)


def parameters(
    rows: int, device: torch.device, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
    """The same for all rows."""
    return Sampling(
        temperature=torch.full((rows,), temperature, device=device),
        top_k=torch.full((rows,), top_k, device=device),
        top_p=torch.full((rows,), top_p, device=device),
        min_p=torch.zeros(rows, device=device),
        seed=torch.arange(rows, device=device),
    )


def chosen(logits: Tensor, sampling: Sampling, name: str) -> Call:
    row = torch.arange(len(logits), device=logits.device)
    greedy, filtered = name == "greedy", name.startswith("top-k")
    return lambda: choose(logits, row, row, sampling, 0, greedy, filtered, True)


def softmax_max(logits: Tensor) -> object:
    return logits.float().softmax(-1).max(-1)


def softmax_multinomial(logits: Tensor) -> object:
    return logits.float().softmax(-1).multinomial(1)


def topk_softmax_multinomial(logits: Tensor) -> object:
    ranked, index = logits.float().topk(50)
    probability = ranked.softmax(-1)
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= 0.9, 0.0)
    return index.gather(-1, probability.multinomial(1))


def s2(here: Machine) -> Iterator[Row]:
    """Settling 64 segments of 32 on the device beside torch and one copy to the host."""
    rows, block = 64, 32
    for name, step, other in (
        ("verify", verify_step(rows, block), verify_in_torch),
        ("denoise", denoise_step(rows, block), denoise_in_torch),
    ):
        laid = known_layout(step, here.device, torch.float32)
        tokens = torch.randint(1, 9, (rows, 256), device=here.device)
        tokens[:, 64:96:3] = 0  # masks in the canvas
        cached = torch.full((rows,), 64, device=here.device)
        passes = torch.zeros_like(cached)
        opened = torch.full((rows,), name == "denoise", device=here.device)
        said = torch.randint(1, 9, (rows * block,), device=here.device)
        sure = torch.rand(rows * block, device=here.device)

        def ours(
            laid: Layout = laid, opened: Tensor = opened, said: Tensor = said, sure: Tensor = sure,
            tokens: Tensor = tokens, cached: Tensor = cached, passes: Tensor = passes,
        ) -> object:  # fmt: skip
            cached.fill_(64)  # as a step found it
            return settle(
                laid.segments,
                laid.parts,
                cached.clone(),
                opened,
                said,
                sure,
                tokens,
                cached,
                passes,
                0,
                block,
            )

        def theirs(
            other: Callable[[Tensor, Tensor, Tensor], object] = other, tokens: Tensor = tokens,
            said: Tensor = said, sure: Tensor = sure,
        ) -> object:  # fmt: skip
            return other(tokens[:, 64:96], said.view(rows, block), sure.view(rows, block))

        sides: dict[str, list[Call]] = {"ours": [ours], "torch, read by the host": [theirs]}
        yield from compared("S2", f"{name}, {rows} x {block}", sides, None, "10 x", here)


def verify_in_torch(line: Tensor, said: Tensor, sure: Tensor) -> object:
    count = accepted(F.pad(line[:, 1:], (0, 1)), said) + 1
    column = torch.arange(line.shape[1], device=line.device)
    return torch.where(column < count[:, None], said, 0).tolist(), count.tolist()


def denoise_in_torch(canvas: Tensor, said: Tensor, sure: Tensor) -> object:
    threshold = torch.full((len(canvas),), 0.9, device=canvas.device)
    after = commit(canvas, said, sure, threshold, torch.ones(len(canvas), device=canvas.device), 0)
    return after.tolist()


def weights(here: Machine) -> dict[str, tuple[int, int]]:
    """[N, K] of each product of a layer, and of the head."""
    shape = here.geometry
    attended = shape.num_heads * shape.head_dim
    return {
        "qkv": (attended + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden_size),
        "o": (shape.hidden_size, attended),
        "gate_up": (2 * shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
        "head": (shape.vocab_size, shape.hidden_size),
    }


def g1(here: Machine) -> Iterator[Row]:
    """Products with weights beside the library's."""
    for name, (n, k) in weights(here).items():
        copies = weight_copies(n, k, here)
        for tokens in (1, 8, 32, 64, 128) if here.device.type == "cuda" else (1, 32):
            x = torch.randn(tokens, k, device=here.device, dtype=here.dtype)
            sides: dict[str, list[Call]] = {
                "ours": [lambda x=x, w=w: linear(x, w) for w in copies],  # type: ignore[misc]
                "F.linear": [lambda x=x, w=w: F.linear(x, w) for w in copies],  # type: ignore[misc]
            }
            bar = "1.15 x" if name in ("down", "o") and tokens <= 32 else "0.95 x"
            floor = max(nbytes(copies[0]) / here.bandwidth, 2 * tokens * n * k / here.rate)
            yield from compared("G1", f"{name} [{n}, {k}], T={tokens}", sides, floor, bar, here)


def g2(here: Machine) -> Iterator[Row]:
    """What exactness costs a product: the fixed configuration beside the one chosen by the number of tokens."""
    for name, (n, k) in weights(here).items():
        copies = weight_copies(n, k, here)
        for tokens in (1, 8, 32, 64, 128, 256, 512) if here.device.type == "cuda" else (1, 32):
            x = torch.randn(tokens, k, device=here.device, dtype=here.dtype)
            sides: dict[str, list[Call]] = {
                "ours": [lambda x=x, w=w: linear(x, w, exact=True) for w in copies],  # type: ignore[misc]
                "not exact": [lambda x=x, w=w: linear(x, w) for w in copies],  # type: ignore[misc]
            }
            floor = max(nbytes(copies[0]) / here.bandwidth, 2 * tokens * n * k / here.rate)
            bar = "0.97 x" if tokens <= 64 else ""
            yield from compared("G2", f"{name} [{n}, {k}], T={tokens}", sides, floor, bar, here)


def weight_copies(n: int, k: int, here: Machine) -> list[Tensor]:
    count = rotations(n * k * here.dtype.itemsize, here.device)
    return [torch.randn(n, k, device=here.device, dtype=here.dtype).mul_(k**-0.5) for _ in range(count)]


SUITES: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "A1": a1, "A2": a2, "A3": a3, "S1": s1, "S2": s2, "G1": g1, "G2": g2,
}  # fmt: skip
TRITON_ONLY = ("A2", "A3")  # they compare the kernel with itself


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'':<4}{'shape':<44}{'other side':<26}{'ours us':>10}{'other us':>10}{'ratio':>7}{'roof':>6}  bar"
    ]
    for row in rows:
        theirs = (
            f"{1e6 * row.theirs:>10.1f}{row.ratio:>7.2f}" if row.theirs is not None else f"{'-':>10}{'-':>7}"
        )
        share = f"{100 * row.share:>5.0f}%" if row.share is not None else f"{'-':>6}"
        note = f"  ({row.note})" if row.note else ""
        lines.append(
            f"{row.suite:<4}{row.shape:<44}{row.other:<26}{1e6 * row.ours:>10.1f}{theirs}{share}  {row.bar}{note}"
        )
    return "\n".join(lines)


def run_suite(suite: str, here: Machine, rows: list[Row], problems: list[str]) -> None:
    """Adds the suite's rows, and what went wrong."""
    if suite in TRITON_ONLY and not on_triton(torch.empty(0, device=here.device)):
        print(f"{suite} is skipped: it compares the kernel with itself and needs CUDA", file=sys.stderr)
        return
    try:
        for row in SUITES[suite](here):
            rows.append(row)
            print(table([row]).partition("\n")[2], file=sys.stderr, flush=True)
    except (RuntimeError, AssertionError) as error:
        problems.append(f"{suite}: {error}")
        print(problems[-1], file=sys.stderr)
    if here.device.type == "cuda":
        torch.cuda.empty_cache()


def measured(device: torch.device, size: str, repeats: int) -> Machine:
    """The machine, its bandwidth and rate included."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Machine(device, dtype, geometry(size), read_bandwidth(device), matmul_rate(device, dtype), repeats)


def compile_only(everything: bool, processes: int, target: Path | None) -> int:
    """Compiles, compares with the record and, if there is a target, writes what may become the new one."""
    launches = all_launches() if everything else default_launches()
    now, problems = compile_all(launches, processes)
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        known = {
            key: build for key, build in now["builds"].items() if not everything or key in record["builds"]
        }
        differences = drift(record, now | {"builds": known})
        for line in differences:
            print(f"drift: {line}")
        if not differences:
            print(
                f"{len(now['builds'])} builds for each of {len(ARCHITECTURES)} architectures, all as recorded"
            )
        problems += missing(record, now)
    write_report(target, now)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.bench_kernels", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--compile-only", action="store_true", help="compile for GPUs that need not be there")
    parser.add_argument(
        "--all", action="store_true", help="with --compile-only: every size, shape and option"
    )
    parser.add_argument("--processes", type=int, default=1, help="that compile at a time")
    parser.add_argument("--json", type=Path, help="where the results go; by default nowhere")
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="SUITE")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    if options.compile_only:
        return compile_only(options.all, options.processes, options.json)
    cuda = torch.cuda.is_available()
    if not cuda:
        print(
            "no CUDA: the torch references run at small shapes; of the kernels this says nothing",
            file=sys.stderr,
        )
        torch.set_num_threads(1)
    here = measured(torch.device("cuda" if cuda else "cpu"), "14b" if cuda else "toy", options.repeats)
    about = machine() | {"read_bandwidth": here.bandwidth, "matmul_rate": here.rate}
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    rows: list[Row] = []
    problems: list[str] = []
    for suite in options.only:
        run_suite(suite, here, rows, problems)
        shown = [{**asdict(row), "ratio": row.ratio, "share": row.share} for row in rows]
        write_report(options.json, {"machine": about, "rows": shown, "problems": problems})
    print(table(rows))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
