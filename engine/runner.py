"""One rank: the model, the KV memory and the device tables. Executes steps in order; plans nothing."""

import time
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.batch import Layout, layout
from engine.checkpoint import local_folder
from engine.config import EngineConfig, ModelConfig, Sizes
from engine.device import check_device
from engine.fp8 import check_fp8
from engine.graphs import Graphs
from engine.model import Model
from engine.output import HostOutput, to_host
from engine.state import Tables
from engine.step import Step
from engine.tp import Alone, Group
from engine.weights import dummy_weights, load_weights
from kernels.backend import on_triton
from kernels.expand import Expanded, expand
from kernels.settle import settle
from kernels.vocabulary import choose, combine, summarise


class Runner:
    """Runs packed steps. `forward_seconds` adds up the time inside the model's forward and head on a CPU."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.model, self.group, self.page_size = model, model.group, config.page_size
        self.adapter = config.draft_lora and model.has_adapter
        sizes = Sizes.of(config, model.config)
        length = sizes.max_model_len + sizes.slack
        columns = -(-length // config.page_size)
        self.canvas = max(sizes.block_length, config.quadratic_block_length)
        geometry, pages = model.config, config.kv_tokens // config.page_size
        self.tables = Tables(
            config.max_running, length, columns, self.canvas, geometry.mask_id, pages, model.device
        )
        # the last page is the padding's
        shape = (
            geometry.num_layers,
            pages + 1,
            config.page_size,
            2 * model.share.num_kv_heads,
            geometry.head_dim,
        )
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.forward_seconds = 0.0
        self.graphs: Graphs | None = None
        if on_triton(self.kv):
            limit = min(config.max_batch_tokens, columns * config.page_size)
            scratch_row = self.tables.scratch_row
            sharded = self.group.size > 1
            self.graphs = Graphs(self._execute, config.max_running, scratch_row, limit, model.device, sharded)

    @torch.inference_mode()
    def run(self, steps: Seq[Step]) -> HostOutput:
        """Executes the steps one after the other; the last one's output, which may still be on its way."""
        if self._one_graph(steps):
            assert self.graphs is not None
            for step in steps:
                self.tables.update(step)
            packed = self.graphs.run(steps)
        else:
            for step in steps:
                self.tables.update(step)
                packed = self._run(step)
        return to_host(packed[: len(steps[-1].segments)])

    @torch.inference_mode()
    def capture(self) -> None:
        """Records all graphs that serving needs. Without CUDA there are none."""
        if self.graphs is not None and self.kv.is_cuda:
            for key in self.graphs.keys(self.adapter):
                self.graphs.capture(key)
            self.graphs.warm_up()

    def _one_graph(self, steps: Seq[Step]) -> bool:
        # a sequence that starts may take the row of one whose draft has not been run yet
        return (
            self.graphs is not None
            and len(steps) > 1
            and not any(len(step.rows) for step in steps[1:])
            and self.graphs.holds(steps)
        )

    def _run(self, step: Step) -> Tensor:
        if self.graphs is not None and self.graphs.shape(step) is not None:
            return self.graphs.run([step])
        of = layout(step, self.tables.scratch_row, self.model.device, self.model.dtype)
        return self._execute(of, step.filtered, step.greedy, step.confident)

    def _execute(
        self, layout: Layout, filtered: bool, greedy: bool = False, confident: bool = True
    ) -> Tensor:
        """One forward and what ends its segments. The last three are hints, as in `choose`."""
        tables, rows = self.tables, layout.rows
        batch, logits = self.forward(layout)
        said, sure = batch.row, tables.sampling.temperature  # nobody reads them where there are no logits
        if len(logits):
            row, target = (batch.row, batch.target) if rows is None else (batch.row[rows], batch.target[rows])
            said, sure = self._choose(logits, row, target, filtered, greedy, confident)
        return settle(
            layout.segments,
            layout.parts,
            batch.context,
            batch.open,
            said,
            sure,
            tables.tokens,
            tables.cached,
            tables.passes,
            tables.mask_id,
            self.canvas,
        )

    def _choose(
        self, logits: Tensor, row: Tensor, target: Tensor, filtered: bool, greedy: bool, confident: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens and confidences, as `choose`, of logits [R, vocab / ranks]. A filter needs whole rows; without one the
        ranks tell each other no more than what their shards come to."""
        sampling, mask_id = self.tables.sampling, self.tables.mask_id
        if self.group.size == 1 or filtered:
            whole = self.group.gather(logits)
            return choose(whole, row, target, sampling, mask_id, greedy, filtered, confident)
        no_limit = logits.new_full((len(logits),), float("-inf"))
        summary = summarise(logits, row, target, sampling, no_limit, mask_id, self.model.vocab_start)
        return combine(self.group.gather(summary), row, sampling)

    def forward(self, layout: Layout) -> tuple[Expanded, Tensor]:
        """The model on a step: what it read, and the logits of the layout's rows, [R, vocab / ranks]."""
        tables = self.tables
        batch = expand(
            layout.segments,
            layout.known,
            layout.query_tokens,
            tables.tokens,
            tables.cached,
            tables.passes,
            tables.pages,
            self.page_size,
            tables.mask_id,
            self.canvas,
            self.model.dtype if layout.lora else None,
        )
        attention = self.model.plan(batch, layout, tables.pages, self.page_size)
        start = time.perf_counter()
        hidden = self.model.forward(batch, self.kv, attention)
        if layout.rows is not None:
            hidden = hidden[layout.rows]
        # without rows there is nothing to launch a kernel for
        logits = self.model.head(hidden) if len(hidden) else hidden
        self.forward_seconds += time.perf_counter() - start
        return batch, logits


def load_model(config: EngineConfig, group: Group | None = None) -> Model:
    """Loads a rank's share of the checkpoint that the configuration names. Raises CheckpointError, and ValueError as
    `Sizes` and `check_fp8` do."""
    group = group or Alone()
    if group.size != config.tensor_parallel:
        raise ValueError(
            f"tensor_parallel: {config.tensor_parallel} needs as many ranks, and not {group.size}"
        )
    dummy, device, fp8 = config.load_format == "dummy", torch.device(config.device), config.weights == "fp8"
    if fp8:
        check_fp8(device)
    folder = local_folder(config.checkpoint, weights=not dummy)
    geometry = ModelConfig.from_json(folder / "config.json")
    check_device(config, geometry)
    sizes = Sizes.of(config, geometry)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dummy:
        weights = dummy_weights(geometry, dtype, device, group.rank, group.size, fp8)
    else:
        weights = load_weights(folder, geometry, dtype, device, group.rank, group.size, fp8)
    return Model(geometry, weights, sizes.max_model_len + sizes.slack, config.exact, group)
