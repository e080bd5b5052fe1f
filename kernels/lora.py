"""A low-rank addition for the tokens that ask for it."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton
from kernels.linear import multiply, token_tile

_BLOCK_N = 32  # 160 programs for the 5120 rows of the 14B's B
_SPLIT_K = 256  # columns of A per program: A is small, so it takes many programs to read it at once
_MAX_SPLITS = 16


def gated_lora_add(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """out + gate * (x A^T B^T): out [T, n], x [T, k], a [r, k], b [n, r] with the scale folded in, gate [T, 1].

    Written into out, which is also returned; all contiguous. A row whose gate is 0 keeps its bits, and where all
    gates of a tile of tokens are 0 the kernels do not read a and b.
    """
    if not on_triton(out):
        return gated_lora_add_reference(out, x, a, b, gate)
    assert all(part.is_contiguous() for part in (out, b, gate))
    (tokens, rows), rank = out.shape, len(a)
    block_t = token_tile(tokens)
    shrunk = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    splits = min(_MAX_SPLITS, max(1, x.shape[1] // _SPLIT_K))
    multiply(x, a, shrunk, block_t, _BLOCK_N, splits, gate=gate)
    launch(
        _expand,
        (triton.cdiv(tokens, block_t), triton.cdiv(rows, _BLOCK_N)),
        out,
        shrunk,
        b,
        gate,
        tokens,
        N=rows,
        RANK=rank,
        BLOCK_T=block_t,
        BLOCK_N=_BLOCK_N,
        BLOCK_RANK=max(16, triton.next_power_of_2(rank)),
    )
    return out


def gated_lora_add_reference(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    return out.addcmul_(F.linear(F.linear(x, a), b), gate)


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    out,
    shrunk,
    b,
    gate,
    tokens,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = token < tokens
    gates = tl.load(gate + token, mask=present, other=0.0).to(tl.float32)
    if tl.max((gates != 0).to(tl.int32), 0) == 0:
        return
    rank = tl.arange(0, BLOCK_RANK)[None, :]
    token_at = token[:, None].to(tl.int64)
    z = tl.load(shrunk + token_at * RANK + rank, mask=present[:, None] & (rank < RANK), other=0.0)
    b_tile = tl.load(b + row[:, None] * RANK + rank, mask=(row[:, None] < N) & (rank < RANK), other=0.0)
    delta = tl.dot(z, b_tile.T, input_precision="ieee")
    here = (gates != 0)[:, None] & (row[None, :] < N)
    at = out + token_at * N + row[None, :]
    value = tl.load(at, mask=here, other=0.0).to(tl.float32) + gates[:, None] * delta
    tl.store(at, value.to(out.dtype.element_ty), mask=here)
