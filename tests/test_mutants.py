"""The suite has teeth: a wrong mask, position or noise index does not get past it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import SamplingParams
from kernels.expand import Expanded, expand
from kernels.verify import accepted
from kernels.vocabulary import choose
from test_exactness import check_lossless
from test_model import check_step

Mutant = Callable[[Expanded], Expanded]


def looks_ahead(batch: Expanded) -> Expanded:
    """Every token sees the one after it as well."""
    return batch._replace(upto=batch.upto + 1)


def forgets_itself(batch: Expanded) -> Expanded:
    """No token but a segment's first sees itself."""
    return batch._replace(upto=(batch.upto - 1).clamp(min=1))


def wrong_group(batch: Expanded) -> Expanded:
    """A mask group sees one draft too many."""
    if batch.lo is None:
        return batch
    return batch._replace(upto=torch.where(batch.lo > 0, batch.upto + 1, batch.upto))


def shifted_positions(batch: Expanded) -> Expanded:
    """Every segment longer than a token stands one position late."""
    late = ((batch.row[:, None] == batch.row).sum(1) > 1).long()
    return batch._replace(positions=batch.positions + late)


def unanchored_groups(batch: Expanded) -> Expanded:
    """Mask groups stand one position early."""
    if batch.lo is None:
        return batch
    return batch._replace(positions=torch.where(batch.lo > 0, batch.positions - 1, batch.positions))


def everything() -> None:
    """The fixed core of the exactness suite: the network's rows, greedy tokens, sampled tokens."""
    check_step(0)
    sizes = {"block_length": 8, "page_size": 4}
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature, seed=5, max_tokens=25, ignore_eos=True)] * 4
        check_lossless(17, params, sizes, switches=False)


def test_the_core_passes_as_it_is() -> None:
    everything()


@pytest.mark.parametrize(
    "mutant", [looks_ahead, forgets_itself, wrong_group, shifted_positions, unanchored_groups]
)
def test_a_mutant_mask_or_position_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Expanded:
        return mutant(expand(*arguments))

    monkeypatch.setattr("engine.runner.expand", wrong)
    with pytest.raises(AssertionError):
        everything()


def test_a_mutant_noise_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that depends on where a row stands in its batch instead of its position in the text."""

    def by_row(logits: Tensor, row: Tensor, position: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return choose(logits, row, torch.arange(len(logits)), *rest)

    monkeypatch.setattr("engine.runner.choose", by_row)
    with pytest.raises(AssertionError):
        everything()


def test_a_mutant_acceptance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One drafted token too many is believed."""
    monkeypatch.setattr(
        "kernels.settle.accepted", lambda d, s: (accepted(d, s) + 1).clamp(max=s.shape[1] - 1)
    )
    with pytest.raises(AssertionError):
        everything()
