"""The ragged forward against the dense network, on random weights."""

import random
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import oracle
from engine.config import SamplingParams
from engine.request import Request
from engine.segment import Pattern, Segment, Settle
from engine.sequence import Sequence
from engine.step import pack
from fakes import TOY, TOY_ENGINE, random_weights, toy_engine, toy_model
from kernels.attention import AttentionPlan
from kernels.expand import Expanded


def placed(tokens: list[int], prompt: int, row: int) -> Sequence:
    sequence = Sequence(
        Request(str(row), tuple(tokens[:prompt]), generated=tuple(tokens[prompt:])), "ar", TOY.eos_ids, row
    )
    sequence.start(row, 0)
    return sequence


def check_step(seed: int) -> None:
    """Runs a causal, a canvas and a quadratic segment in one step; asserts that each row is the dense network's."""
    chance = random.Random(seed)
    model, weights = toy_model(seed, TOY_ENGINE), random_weights(TOY, seed, torch.float64)
    engine = toy_engine(seed)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    legal = [t for t in range(TOY.vocab_size) if t != TOY.mask_id]
    texts = [[chance.choice(legal) for _ in range(chance.randint(9, 40))] for _ in range(3)]
    sequences = [placed(text, 4, row) for row, text in enumerate(texts)]
    pool = engine.scheduler.pool
    granted = []
    for sequence in sequences:
        pages = pool.grant(sequence.pages, 40)
        granted += [(sequence.row, column, page) for column, page in enumerate(pages)]
    chunks = [
        Segment(s, None, len(t) - 1, Pattern.CAUSAL, Settle.KEEP, 0)
        for s, t in zip(sequences, texts, strict=True)
    ]
    runner.run([pack(chunks, sequences, granted)])
    segments = [
        Segment(sequences[0], None, 1, Pattern.CAUSAL, Settle.SAMPLE, 1),
        Segment(sequences[1], None, 8, Pattern.CANVAS, Settle.DENOISE, 0, lora=True),
        Segment(sequences[2], None, 4, Pattern.QUADRATIC, Settle.VERIFY, 4),
    ]
    step = pack(segments, [], [])
    seen: list[Tensor] = []

    def watch(batch: Expanded, kv: Tensor, attention: AttentionPlan) -> Tensor:
        seen.append(model.forward(batch, kv, attention))
        return seen[0]

    with patch.object(runner.model, "forward", watch):
        runner.run([step])
    got = model.head(seen[0])
    got[:, TOY.mask_id] = float("-inf")  # nobody says it

    plain = oracle.causal_logits(TOY, weights, texts[0])[-1]
    torch.testing.assert_close(got[0], plain, rtol=0, atol=1e-11)

    start, mask = len(texts[1]) - 1, TOY.mask_id
    tokens = texts[1] + [mask] * 7
    visible = torch.ones(len(tokens), len(tokens)).tril().bool()
    visible[start:] = True
    on = torch.zeros(len(tokens), dtype=torch.float64)
    on[start:] = 1
    want = oracle.forward(TOY, weights, tokens, list(range(len(tokens))), visible, on)[start:]
    torch.testing.assert_close(got[1:9], want, rtol=0, atol=1e-11)

    base = texts[2]
    drafts = [mask] * 3  # nothing is drafted yet: the pending drafts are masks
    torch.testing.assert_close(got[9:13], oracle.causal_logits(TOY, weights, base + drafts)[-4:])
    for group in range(4):
        prefix = base + drafts[:group]
        tokens = prefix + [mask] * 4
        visible = torch.ones(len(tokens), len(tokens)).tril().bool()
        visible[len(prefix) :] = True
        want = oracle.forward(TOY, weights, tokens, list(range(len(tokens))), visible)[len(prefix) :]
        torch.testing.assert_close(got[13 + 4 * group : 17 + 4 * group], want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_causal_canvas_and_quadratic_segments_in_one_step_equal_the_dense_network(seed: int) -> None:
    check_step(seed)


def test_prefill_in_any_chunks_gives_the_same_cache() -> None:
    caches = []
    for budget in (160, 98):
        engine = toy_engine(1, max_batch_tokens=budget)
        prompt = tuple(i % 39 if i % 39 != TOY.mask_id else 1 for i in range(130))
        engine.add(Request("a", prompt, SamplingParams(max_tokens=9)))
        while not engine.scheduler.running or not engine.scheduler.running[0].decoding:
            engine.step()
        runner = engine.executor.runner  # type: ignore[attr-defined]
        pages = runner.tables.pages[engine.scheduler.running[0].row, :32]
        caches.append(runner.kv[:, pages].flatten(1, 2)[:, :128])
    torch.testing.assert_close(caches[0], caches[1])
