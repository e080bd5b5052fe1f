"""Tensor parallelism: what the ranks that share one model say to each other.

Whatever is decided from data, a token or a confidence, is decided from gathered values, which are the same to the bit
on every rank, so that all ranks keep the same device tables without ever comparing them.
"""

import logging
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

# torch 2.13 has given it another name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Up to here one GPU reading its peers' buffers beats a ring: a step of 64 tokens of the 14B's hidden states.
ONE_SHOT_BYTES = 64 * 5120 * 2


class Group(Protocol):
    """The ranks of one model. All of them call the same operations in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """x, contiguous and of the same shape on every rank, added up over the ranks; may be written into x."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """x [R, n, ...], contiguous, of every rank side by side in rank order: [R, size * n, ...], whose bits are the
        same on every rank."""
        ...


class Alone:
    """One rank that holds the whole model."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


class Distributed:
    """Ranks in processes of their own, over a process group: NCCL on GPUs, gloo on CPUs.

    exact: sums are made in rank order and rounded once, whatever their size, so that a token's do not depend on the
    other tokens of its step. Otherwise GPUs in reach of each other's memory add small messages up in one shot.
    """

    def __init__(
        self, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> None:
        """dtype: of the hidden states. Every rank of the group constructs this at the same time."""
        self.rank, self.size, self.exact = group.rank(), group.size(), exact
        self._group = group
        self._buffer = None
        if device.type == "cuda" and not exact:
            self._buffer = _shared_buffer(group, dtype, device)
            how = "NCCL" if self._buffer is None else f"one shot up to {ONE_SHOT_BYTES} bytes, else NCCL"
            logger.info("rank %d of %d adds up by %s", self.rank, self.size, how)

    def sum(self, x: Tensor) -> Tensor:
        if self.exact:
            first, *others = self._parts(x).unbind()
            total = first.to(torch.promote_types(x.dtype, torch.float32))
            for part in others:
                total = total + part
            return total.to(x.dtype)
        if self._buffer is not None and x.nbytes <= ONE_SHOT_BYTES and x.dtype is self._buffer.dtype:
            shared = self._buffer[: x.numel()].view_as(x)
            shared.copy_(x)
            added: Tensor = torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._group.group_name)
            return added
        dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        return self._parts(x).transpose(0, 1).flatten(1, 2)

    def _parts(self, x: Tensor) -> Tensor:
        """x of every rank, [size, ...]."""
        parts = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(parts, x, group=self._group)
        return parts.view(self.size, *x.shape)


def _shared_buffer(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A buffer of ONE_SHOT_BYTES that every rank can read of every other; None on all ranks if one cannot have it."""
    from torch.distributed import _symmetric_memory as symmetric  # CUDA builds only

    def all_have(own: bool) -> bool:
        votes = torch.tensor(int(own), device=device)
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        return bool(votes.item())

    buffer = None
    try:
        buffer = symmetric.empty(ONE_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=device)
    except RuntimeError as error:
        logger.info("no symmetric memory: %s", error)
    if not all_have(buffer is not None) or buffer is None:
        return None
    reached = True
    try:
        symmetric.rendezvous(buffer, group)
    except RuntimeError as error:
        logger.info("no symmetric memory in reach of all ranks: %s", error)
        reached = False
    return buffer if all_have(reached) else None
