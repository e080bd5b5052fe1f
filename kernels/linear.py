"""Products with weights: a GEMM for few tokens, which is as fast as it reads the weight, and the library's for many."""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton

SKINNY_TOKENS = 64  # up to here reading the weight is all the time there is
_BLOCK_N, _BLOCK_K = 64, 128
_PROGRAMS = 264  # at once: two on each of the 132 SMs of an H100 or H200
_SPLIT_K = 1024  # columns that a program has at least
_COUNTERS = 1 << 16


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    """x W^T: x [T, K], weight [N, K], both contiguous, to [T, N] of out_dtype (x's, if None), summed in float32.

    scale: [N] float32, of a weight in float8_e4m3fn; the weight is converted to x's dtype as it is read, and the
    product scaled. exact: a row has the same bits whatever T is; without it only up to rounding, since many tokens take
    the library. The kernel's tiles hold 64 tokens however few there are: the warp group's matrix units read a weight
    faster than the warp's do in smaller tiles. Launches that split K share counters, so they must share one stream.
    """
    if not on_triton(x):
        # the common case at once, since it is called more often than all else on a CPU
        plain = scale is None and out_dtype is None
        return F.linear(x, weight) if plain else linear_reference(x, weight, scale, out_dtype, exact)
    tokens, rows = len(x), len(weight)
    # the interpreter's tensors are on the CPU, and tests want the kernel there
    if tokens > SKINNY_TOKENS and scale is None and not exact and x.device.type != "cpu":
        if out_dtype in (None, x.dtype):
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out_dtype=out_dtype)
    out = torch.empty(tokens, rows, dtype=out_dtype or x.dtype, device=x.device)
    multiply(x, weight, out, SKINNY_TOKENS, _BLOCK_N, splits_of(rows, x.shape[1]), scale=scale)
    return out


def linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    if scale is None:
        out = F.linear(x, weight)
        return out if out_dtype is None else out.to(out_dtype)
    return (F.linear(x, weight.to(x.dtype)) * scale).to(out_dtype or x.dtype)


def token_tile(tokens: int) -> int:
    """Rows of a tile: the fewest of 16, 32 and 64 that hold all tokens, else 64."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def splits_of(rows: int, columns: int) -> int:
    """Into how many parts K is cut: by the weight's shape alone, so that the order of a sum depends on nothing else."""
    tiles: int = triton.cdiv(rows, _BLOCK_N)
    return max(1, min(_PROGRAMS // tiles, columns // _SPLIT_K))


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    block_t: int,
    block_n: int,
    splits: int,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """out = x W^T in tiles of [block_t, block_n], K in splits; one launch.

    Before: x [T, K], weight [N, K], out [T, N], scale [N] or None, gate [T, 1] or None. After: out is written but for
    the tiles of tokens whose gates are all 0. The parts of a split K are added in their order by the program that
    finishes last, so a result has the same bits in every run.
    """
    assert x.is_contiguous() and weight.is_contiguous()
    (tokens, columns), rows = x.shape, len(weight)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(rows, block_n), splits)
    parts, counters = out, out
    if splits > 1:
        parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
        assert grid[0] * grid[1] <= len(counters)
    launch(
        _multiply,
        grid,
        x,
        weight,
        x if scale is None else scale,
        x if gate is None else gate,
        out,
        parts,
        counters,
        tokens,
        N=rows,
        K=columns,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=_BLOCK_K,
        SPLITS=splits,
        SCALED=scale is not None,
        GATED=gate is not None,
        num_warps=4 if block_t == 16 else 8,  # the fewest without a spill
        num_stages=3 if block_t == 64 else 4,  # what lets two programs share an SM's memory
    )


@cache
def _counters(device: torch.device) -> Tensor:
    """Arrivals at each tile, zero between launches; never replaced, since captured graphs hold its address."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["tokens"])
def _multiply(
    x,
    weight,
    scale,
    gate,
    out,
    parts,
    counters,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WHOLE: tl.constexpr = N % BLOCK_N == 0 and K % BLOCK_K == 0
    # programs that read the same weights run next to each other
    first_token, first_row, split = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    in_tile_t, in_tile_n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    token, row = first_token + in_tile_t, first_row + in_tile_n
    present = token[:, None] < tokens
    if GATED:
        gates = tl.load(gate + token, mask=token < tokens, other=0.0).to(tl.float32)
        if tl.max((gates != 0).to(tl.int32), 0) == 0:
            return

    first = split * STEPS // SPLITS
    column = first * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    # 64 bits for where a tile begins, 32 within it
    x_at = x + first_token.to(tl.int64) * K + (in_tile_t[:, None] * K + column)
    weight_at = weight + first_row.to(tl.int64) * K + (in_tile_n[:, None] * K + column)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for step in tl.range(first, (split + 1) * STEPS // SPLITS):
        if WHOLE:
            x_tile = tl.load(x_at, mask=present, other=0.0)
            weight_tile = tl.load(weight_at)
        else:
            inside = column + (step - first) * BLOCK_K < K
            x_tile = tl.load(x_at, mask=present & inside, other=0.0)
            weight_tile = tl.load(weight_at, mask=(row[:, None] < N) & inside, other=0.0)
        acc = tl.dot(x_tile, weight_tile.to(x_tile.dtype).T, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K

    here = present & (row[None, :] < N)
    begin = first_token.to(tl.int64) * N + first_row
    at = in_tile_t[:, None] * N + in_tile_n[None, :]
    if SPLITS > 1:
        tl.store(parts + (split * tokens.to(tl.int64) * N + begin) + at, acc, mask=here)
        tl.debug_barrier()  # what all threads have stored is visible before one of them counts
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(counter, 0)
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for part in tl.static_range(SPLITS):
            acc += tl.load(parts + (part * tokens.to(tl.int64) * N + begin) + at, mask=here, other=0.0)
    if SCALED:
        acc *= tl.load(scale + row, mask=row < N, other=0.0)[None, :]
    tl.store(out + begin + at, acc.to(out.dtype.element_ty), mask=here)
