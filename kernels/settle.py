"""What ends a segment: keep, sample, denoise or verify. Updates the device tables; says what was committed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton
from kernels.commit import commit, commits
from kernels.expand import Segments
from kernels.verify import accepted, accepts

# settle operations; a PAD segment has none of them
KEEP, SAMPLE, DENOISE, VERIFY, NOTHING = range(5)


class Part(NamedTuple):
    """The P segments of a step that one operation ends, known to the host: the torch side takes them together."""

    settle: int
    span: slice  # where they are among the step's segments
    row: Tensor  # [P] row of the device tables
    block: Tensor  # [P]
    logits: Tensor  # [P, W] their rows of the logits, the last one repeated behind shorter blocks; of a sample, one
    inside: Tensor  # [P, W] bool: the block is as long
    threshold: Tensor  # [P]
    steps: Tensor  # [P]
    commits: bool  # whether they may commit a token
    quadratic: Tensor | None  # indices of the quadratic ones; None if there are none


def settle(
    segments: Segments,
    parts: list[Part] | None,
    context: Tensor,
    is_open: Tensor,
    said: Tensor,
    sure: Tensor,
    tokens: Tensor,
    cached: Tensor,
    passes: Tensor,
    mask_id: int,
    width: int,
) -> Tensor:
    """Settles S segments.

    parts: of the same step; the Triton side needs none. context: [S] int64 and is_open: [S] bool, of the expansion.
    said: [R] int64, the token that each row of the logits chose; sure: [R], its confidence, read where a canvas is
    denoised. tokens: [rows, length] int64, cached, passes: [rows] int64, the device tables, are written. width: of
    the longest block, in tokens. Returns [S, 1 + W] int64: how many tokens each segment committed, then the tokens,
    of which so many hold. Behind the 0 of a draft, or of a canvas that stays open, stand its tokens after the pass, but
    for the seed token.
    """
    if not on_triton(tokens):
        assert parts is not None
        return settle_reference(
            segments, parts, context, is_open, said, sure, tokens, cached, passes, mask_id, width
        )
    out = torch.empty(len(context), 1 + width, dtype=torch.int64, device=tokens.device)
    launch(
        _settle_kernel,
        (len(context),),
        segments.row,
        segments.length,
        segments.block,
        segments.pattern,
        segments.settle,
        segments.commits,
        segments.steps,
        segments.logit,
        segments.threshold,
        context,
        is_open,
        said,
        sure,
        tokens,
        cached,
        passes,
        out,
        tokens.stride(0),
        mask_id,
        num_warps=1,
        WIDTH=width,
        COLUMNS=triton.next_power_of_2(width),
    )
    return out


def settle_reference(
    segments: Segments,
    parts: list[Part] | None,
    context: Tensor,
    is_open: Tensor,
    said: Tensor,
    sure: Tensor,
    tokens: Tensor,
    cached: Tensor,
    passes: Tensor,
    mask_id: int,
    width: int,
) -> Tensor:
    """As `settle`, in torch; W is as wide as this step needs."""
    assert parts is not None
    outputs: list[Tensor] = []
    for part in parts:
        before = context[part.span]
        if part.settle == KEEP:
            cached.index_add_(0, part.row, part.block)
            outputs.append(_nothing(part))
        elif part.settle == SAMPLE:
            outputs.append(_sample(part, before, said, tokens, cached))
        elif part.settle == VERIFY:
            outputs.append(_verify(part, before, said, tokens, cached, mask_id))
        elif part.commits:
            opened = is_open[part.span]
            outputs.append(_denoise(part, before, opened, said, sure, tokens, cached, passes, mask_id))
        else:  # canvases of masks, filled in one pass and verified in the next step
            drafted = part.logits[:, 1:]
            drafts = said[drafted]
            tokens[part.row[:, None], before[:, None] + drafted - part.logits[:, :1]] = drafts
            outputs.append(F.pad(drafts, (1, 0)))
    if len(outputs) == 1:
        return outputs[0]
    columns = max(output.shape[1] for output in outputs)
    return torch.cat([F.pad(output, (0, columns - output.shape[1])) for output in outputs])


def _nothing(part: Part) -> Tensor:
    return torch.zeros_like(part.row)[:, None]


def _sample(part: Part, context: Tensor, said: Tensor, tokens: Tensor, cached: Tensor) -> Tensor:
    token, position = said[part.logits], context + part.block
    tokens[part.row, position] = token[:, 0]
    cached[part.row] = position
    return F.pad(token, (1, 0), value=1)


def _denoise(
    part: Part,
    context: Tensor,
    is_open: Tensor,
    said: Tensor,
    sure: Tensor,
    tokens: Tensor,
    cached: Tensor,
    passes: Tensor,
    mask_id: int,
) -> Tensor:
    row, block = part.row, part.block
    slot = context[:, None] + torch.arange(part.inside.shape[1], device=row.device)
    canvas = tokens[row[:, None], slot].masked_fill(~part.inside, -1)
    drawn, confidence = said[part.logits], sure[part.logits]
    left = (canvas == mask_id).sum(1)
    passes_left = (part.steps - passes[row]).clamp(min=1)
    quota = torch.where(part.steps > 0, -(-left // passes_left), 1)
    after = commit(canvas, drawn, confidence, part.threshold.to(confidence.dtype), quota, mask_id)
    # an open canvas stays where it is; a finished one is committed, and its causal pass gave the next seed token
    seed = drawn[:, -1:]  # the rows behind shorter blocks repeat their last
    new = torch.cat((after[:, 1:], seed), 1).scatter(1, block[:, None] - 1, seed)
    tokens[row[:, None], slot] = torch.where(part.inside, after, mask_id)
    end = context + block
    tokens[row, end] = torch.where(is_open, mask_id, seed[:, 0])
    cached[row] = torch.where(is_open, context, end)
    passes[row] = torch.where(is_open, passes[row] + 1, 0)
    return torch.cat((torch.where(is_open, 0, block)[:, None], new), 1)


def _verify(
    part: Part, context: Tensor, said: Tensor, tokens: Tensor, cached: Tensor, mask_id: int
) -> Tensor:
    row, block = part.row, part.block
    column = torch.arange(part.logits.shape[1], device=row.device)
    target = (context + 1)[:, None] + column  # row j of a block decides what stands at context + 1 + j
    spoken = said[part.logits]
    # behind a block there are masks, which nobody says: acceptance ends there by itself
    count = accepted(tokens[row[:, None], target], spoken) + 1
    tokens[row[:, None], target] = torch.where(column < count[:, None], spoken, mask_id)
    end = context + count
    cached[row] = end
    if part.quadratic is not None:
        # the mask group anchored after the accepted drafts holds the next ones, and its first mask the seed token
        chosen = part.quadratic
        inner = column[1:].minimum(block[chosen, None] - 1)
        group = part.logits[chosen, :1] + (block * count)[chosen, None] + inner
        tokens[row[chosen, None], end[chosen, None] + inner] = said[group]
    return torch.cat((count[:, None], spoken), 1)


@triton.jit
def _settle_kernel(
    row_ptr,
    length_ptr,
    block_ptr,
    pattern_ptr,
    settle_ptr,
    commits_ptr,
    steps_ptr,
    logit_ptr,
    threshold_ptr,
    context_ptr,
    open_ptr,
    said_ptr,
    sure_ptr,
    tokens_ptr,
    cached_ptr,
    passes_ptr,
    out_ptr,
    tokens_stride,
    mask_id,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a segment. The operations' codes: 0 keep, 1 sample, 2 denoise, 3 verify, 4 nothing."""
    segment = tl.program_id(0)
    out = out_ptr + segment * (1 + WIDTH)
    tl.store(out, 0)
    if tl.load(length_ptr + segment) == 0:
        return
    settle = tl.load(settle_ptr + segment)
    row = tl.load(row_ptr + segment)
    block = tl.load(block_ptr + segment)
    context = tl.load(context_ptr + segment)
    logit = tl.load(logit_ptr + segment)
    line = tokens_ptr + row * tokens_stride + context
    column = tl.arange(0, COLUMNS)
    inside = column < block
    if settle == 0:
        tl.store(cached_ptr + row, context + block)
    elif settle == 1:
        token = tl.load(said_ptr + logit + block - 1)
        tl.store(line + block, token)
        tl.store(cached_ptr + row, context + block)
        tl.store(out, 1)
        tl.store(out + 1, token)
    elif settle == 2:
        # the seed token's own position is not drawn
        behind_seed = inside & (column >= 1)
        drawn = tl.load(said_ptr + logit + column, mask=behind_seed, other=-1)
        if tl.load(commits_ptr + segment) == 0:
            tl.store(line + column, drawn, mask=behind_seed)
            tl.store(out + column, drawn, mask=behind_seed)
        else:
            canvas = tl.load(line + column, mask=inside, other=-1)
            confidence = tl.load(sure_ptr + logit + column, mask=behind_seed, other=0.0)
            masked = inside & (canvas == mask_id)
            left = tl.sum(masked.to(tl.int64), 0)
            steps = tl.load(steps_ptr + segment)
            done = tl.load(passes_ptr + row)
            passes_left = tl.maximum(steps - done, 1)
            quota = tl.where(steps > 0, (left + passes_left - 1) // passes_left, 1)
            threshold = tl.load(threshold_ptr + segment).to(confidence.dtype)
            after = tl.where(commits(masked, confidence, threshold, quota), drawn, canvas)
            is_open = tl.load(open_ptr + segment)
            if is_open:
                tl.store(line + column, after, mask=inside)
                tl.store(line + block, mask_id)
                tl.store(out + column, after, mask=behind_seed)
                tl.store(passes_ptr + row, done + 1)
            else:
                seed = tl.load(said_ptr + logit + block - 1)
                tl.store(out, block)
                tl.store(out + column, canvas, mask=behind_seed)
                tl.store(out + block, seed)
                tl.store(line + block, seed)
                tl.store(cached_ptr + row, context + block)
                tl.store(passes_ptr + row, 0)
    elif settle == 3:
        spoken = tl.load(said_ptr + logit + column, mask=inside, other=-1)
        draft = tl.load(line + 1 + column, mask=inside, other=-1)
        count = accepts(draft, spoken, block)
        tl.store(out, count)
        tl.store(out + 1 + column, spoken, mask=inside & (column < count))
        tl.store(cached_ptr + row, context + count)
        # behind the accepted tokens stand masks, or the drafts of the mask group anchored there
        tl.store(line + 1 + column, spoken, mask=inside & (column < count))
        quadratic = tl.load(pattern_ptr + segment) == 2
        group = tl.load(said_ptr + logit + block * count + column, mask=inside & quadratic, other=mask_id)
        behind = tl.where(quadratic, group, mask_id)
        drafted = inside & (quadratic | (count + column < block))
        tl.store(line + count + column, behind, mask=drafted & (column >= 1))
