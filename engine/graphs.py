"""CUDA graphs of whole steps: one for each number of query tokens, since nothing else shapes a launch.

A step is filled up to the next captured size. Lengths, patterns, pages, sampling parameters and the adapter's gates are
device tensors, so that one graph serves all mixtures of modes. A draft and its verification, which the host plans
together, are one graph. Without CUDA the same buffers are filled and the same code runs eagerly.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import FIELDS, Layout, padded_layout, unpack_layout
from engine.step import LENGTH, LORA, Step, padding_step

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448, 512)
ROUND_TOKENS = 128  # query tokens of a step up to which a draft and its verification are one graph

# query tokens, whether the draft adapter is on, and whether a sharded vocabulary's rows are gathered whole for filters
Shape = tuple[int, bool, bool]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: Tensor


class Graphs:
    """Runs steps for `rows` running sequences, of as many query tokens as the largest captured size."""

    def __init__(
        self,
        execute: Callable[[Layout, bool], Tensor],
        rows: int,
        scratch_row: int,
        limit: int,
        device: torch.device,
        sharded: bool,
    ) -> None:
        """execute: a layout, and whether its rows are gathered whole, to the packed output of its step. limit: query
        tokens of any step, and of its padding. sharded: whether ranks share the vocabulary."""
        self.execute, self.rows, self.scratch_row, self.device = execute, rows, scratch_row, device
        self.sizes = sorted({min(size, limit) for size in SIZES})
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._captured: dict[tuple[Shape, ...], _Captured] = {}
        self.limit, self.sharded = limit, sharded
        if device.type == "cuda":
            # blocks of a pool are used again within one stream only
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def size(self, query_tokens: int) -> int | None:
        """The captured size that holds so many query tokens; None if none does."""
        return next((size for size in self.sizes if size >= query_tokens), None)

    def shape(self, step: Step) -> Shape | None:
        """What decides which graph a step takes; None if it is too large for any."""
        size = self.size(int(step.segments[:, LENGTH].sum()))
        if size is None:
            return None
        return size, bool(step.segments[:, LORA].any()), step.filtered and self.sharded

    def run(self, steps: Seq[Step]) -> Tensor:
        """Executes steps that have a shape, one after the other; the last one's output, valid until the next run."""
        key = tuple(shape for step in steps if (shape := self.shape(step)) is not None)
        assert len(key) == len(steps)
        if self.device.type == "cuda" and key not in self._captured:
            self.capture(key)
        self._fill(steps, key)
        if self.device.type != "cuda":
            return self._body(key)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.output

    def keys(self, adapter: bool) -> list[tuple[Shape, ...]]:
        """What a server captures at its start: every size, with the adapter if there is one, and the rounds."""
        keys: list[tuple[Shape, ...]] = []
        for size in reversed(self.sizes):  # the largest first, whose memory the others use again
            for whole in (False, True) if self.sharded else (False,):
                keys += [((size, lora, whole),) for lora in ((False, True) if adapter else (False,))]
                if size <= ROUND_TOKENS:
                    keys.append(((size, adapter, whole), (size, False, whole)))
        return keys

    def capture(self, key: tuple[Shape, ...]) -> None:
        """Records a graph on steps of nothing but padding."""
        self._fill([padding_step() for _ in key], key)
        serving = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(serving)
        with torch.cuda.stream(self._stream):
            self._body(key)  # compiles what is to be captured
        serving.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = self._body(key)
        self._captured[key] = _Captured(graph, output)

    def warm_up(self) -> None:
        """Compiles what steps beyond the captured sizes launch, on a step of nothing but padding, eagerly."""
        if self.size(self.limit) is None:
            packed = padded_layout(padding_step(), self.limit, self.rows, self.scratch_row)
            row = torch.zeros(1, dtype=torch.int64, device=self.device)
            of = unpack_layout(torch.from_numpy(packed).to(self.device), self.limit, row, False)
            for whole in (False, True) if self.sharded else (False,):
                self.execute(of, whole)

    def holds(self, steps: Seq[Step]) -> bool:
        """Whether the steps can run as one without capturing anything first."""
        shapes = [self.shape(step) for step in steps]
        return None not in shapes and (self.device.type != "cuda" or tuple(shapes) in self._captured)

    def _body(self, key: tuple[Shape, ...]) -> Tensor:
        outputs = [
            self.execute(unpack_layout(self._input(slot, size), size, None, lora), whole)
            for slot, (size, lora, whole) in enumerate(key)
        ]
        return outputs[-1]

    def _fill(self, steps: Seq[Step], key: tuple[Shape, ...]) -> None:
        for slot, (step, (size, _, _)) in enumerate(zip(steps, key, strict=True)):
            there = self._input(slot, size)
            packed = torch.from_numpy(padded_layout(step, size, there.shape[1], self.scratch_row))
            there.copy_(packed.pin_memory() if there.is_cuda else packed, non_blocking=True)

    def _input(self, slot: int, size: int) -> Tensor:
        """The buffer from which the graphs of a size read the step in that place of a round."""
        if (slot, size) not in self._inputs:
            count = min(size, self.rows) + 1
            self._inputs[slot, size] = torch.zeros(FIELDS, count, dtype=torch.int64, device=self.device)
        return self._inputs[slot, size]
