"""What ends a segment, on the device: sample, denoise, verify. Each updates the tables; the host learns of it later."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch, Part
from engine.segment import Settle
from engine.state import Tables
from engine.step import Step
from kernels.commit import commit
from kernels.sampling import Sampling
from kernels.verify import accepted
from kernels.vocabulary import choose

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """count: [S] committed tokens of each segment. tokens: [S, W] int64, of which the first `count` hold."""

    count: Tensor
    tokens: Tensor

    def committed(self) -> list[list[int]]:
        """The one copy from the device to the host."""
        packed = torch.cat((self.count[:, None], self.tokens), 1).tolist()
        return [row[1 : 1 + row[0]] for row in packed]


class Settler:
    """The settle operations of one step."""

    def __init__(self, step: Step, batch: Batch, tables: Tables, hidden: Tensor, head: Head) -> None:
        """hidden: [T, hidden size], of the step's query tokens. head: rows of it to logits."""
        self.step, self.batch, self.tables = step, batch, tables
        self.hidden, self.head = hidden, head

    def run(self) -> StepOutput:
        """Settles every segment; [S] counts and their tokens in the order of the batch."""
        operations = {
            Settle.KEEP: self._keep,
            Settle.SAMPLE: self._sample,
            Settle.DENOISE: self._denoise,
            Settle.VERIFY: self._verify,
        }
        outputs = [operations[settle](part) for settle, part in self.batch.layout.parts.items()]
        if len(outputs) == 1:
            return outputs[0]
        width = max(output.tokens.shape[1] for output in outputs)
        padded = [F.pad(output.tokens, (0, width - output.tokens.shape[1])) for output in outputs]
        return StepOutput(torch.cat([output.count for output in outputs]), torch.cat(padded))

    def _choose(
        self, logits: Tensor, row: Tensor, position: Tensor, confident: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens and confidence for logits [R, V] of table rows [R], to stand at the absolute positions [R]."""
        t, step = self.tables, self.step
        sampling = Sampling(t.temperature, t.top_k, t.top_p, t.min_p, t.seed)
        return choose(logits, row, position, sampling, t.mask_id, step.greedy, step.filtered, confident)

    def _keep(self, part: Part) -> StepOutput:
        self.tables.cached.index_add_(0, part.row, part.block)
        return _nothing(part)

    def _sample(self, part: Part) -> StepOutput:
        position = self.batch.context[part.span] + part.block
        logits = self.head(self.hidden[part.first + part.block - 1])
        token, _ = self._choose(logits, part.row, position)
        self.tables.tokens[part.row, position] = token
        self.tables.cached[part.row] = position
        return StepOutput(torch.ones_like(token), token[:, None])

    def _denoise(self, part: Part) -> StepOutput:
        row, block, tables = part.row, part.block, self.tables
        context, open_ = self.batch.context[part.span], self.batch.open[part.span]
        if not part.commits:  # canvases of masks, to be filled in one pass and then verified
            self._fill(row, block, part.first, context, part.width)
            return _nothing(part)
        column = torch.arange(part.width, device=row.device)
        inside = column < block[:, None]  # [P, W]
        query = part.first[:, None] + column.minimum(block[:, None] - 1)
        slot = context[:, None] + column
        canvas = tables.tokens[row[:, None], slot].masked_fill(~inside, -1)
        # bidirectional logits predict their own token, causal ones the next
        position = slot + (~open_).long()[:, None]
        wanted = inside & torch.where(open_[:, None], canvas == tables.mask_id, column == block[:, None] - 1)
        index = wanted.view(-1).nonzero()[:, 0]
        logits = self.head(self.hidden[query.view(-1)[index]])
        owner = row[:, None].expand_as(slot).reshape(-1)[index]
        token, confidence = self._choose(logits, owner, position.view(-1)[index], confident=True)
        drawn = torch.zeros_like(canvas)
        drawn.view(-1)[index] = token
        sure = torch.zeros_like(canvas, dtype=logits.dtype)
        sure.view(-1)[index] = confidence
        left = (canvas == tables.mask_id).sum(1)
        passes_left = (part.steps - tables.passes[row]).clamp(min=1)
        quota = torch.where(part.steps > 0, -(-left // passes_left), 1)
        after = commit(canvas, drawn, sure, part.threshold.to(sure.dtype), quota, tables.mask_id)
        seed = drawn.gather(1, block[:, None] - 1)
        # an open canvas stays where it is; a finished one is committed, and its causal pass gave the next seed token
        new_tokens = torch.cat((after[:, 1:], torch.zeros_like(seed)), 1).scatter(1, block[:, None] - 1, seed)
        tables.tokens[row[:, None], slot] = torch.where(inside, after, tables.mask_id)
        end = context + block
        tables.tokens[row, end] = torch.where(open_, tables.mask_id, seed[:, 0])
        tables.cached[row] = torch.where(open_, context, end)
        tables.passes[row] = torch.where(open_, tables.passes[row] + 1, 0)
        return StepOutput(torch.where(open_, 0, block), new_tokens)

    def _verify(self, part: Part) -> StepOutput:
        row, tables = part.row, self.tables
        context = self.batch.context[part.span]
        column = torch.arange(part.width, device=row.device)
        query = part.first[:, None] + column.minimum(part.block[:, None] - 1)
        target = (context + 1)[:, None] + column  # row j of a block decides what stands at context + 1 + j
        said = self._logits_to_tokens(query, row, target)
        # behind a block there are masks, which nobody says: acceptance ends there by itself
        count = accepted(tables.tokens[row[:, None], target], said) + 1
        tables.tokens[row[:, None], target] = torch.where(column < count[:, None], said, tables.mask_id)
        end = context + count
        tables.cached[row] = end
        if part.quadratic is not None:
            # the mask group anchored after the accepted drafts holds the next ones, and its first mask the seed token
            group = part.first + part.block * count
            chosen = part.quadratic
            self._fill(row[chosen], part.block[chosen], group[chosen], end[chosen], part.width)
        return StepOutput(count, said)

    def _fill(self, row: Tensor, block: Tensor, first: Tensor, context: Tensor, width: int) -> None:
        """Draws drafts for the positions after context [P], up to block [P] - 1 of them, from the bidirectional query
        rows after first [P]."""
        # where a block is shorter than the widest, its last position is drawn again and again
        column = torch.arange(1, width, device=row.device).minimum(block[:, None] - 1)
        target = context[:, None] + column
        drafts = self._logits_to_tokens(first[:, None] + column, row, target)
        self.tables.tokens[row[:, None], target] = drafts

    def _logits_to_tokens(self, query: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """query: [P, W] query tokens whose logits say what stands at position [P, W] of table rows [P]."""
        logits = self.head(self.hidden[query.flatten()])
        owner = row.repeat_interleave(query.shape[1])
        tokens, _ = self._choose(logits, owner, position.flatten())
        return tokens.view_as(query)


def _nothing(part: Part) -> StepOutput:
    """No token of any of the part's segments."""
    return StepOutput(torch.zeros_like(part.row), part.row.new_empty(len(part.row), 0))
