"""Train the tiny checkpoint: `python -m engine.tiny.train`.

Three stages: next-token loss; next-token and denoising loss in one forward; the draft adapter on the frozen model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny import checkpoint, network, vocabulary
from engine.tiny.muon import Masters
from engine.tiny.network import Adapter, Geometry, Network
from engine.tiny.rows import Batch, Row, assemble, batches, encode
from engine.tiny.tasks import draw_task, evaluation_tasks

BATCH_TOKENS = 1024
AR_SHARE, ADAPTER_SHARE, DECAY_SHARE = 0.1, 0.1, 0.5
MUON_RATE, ADAM_RATE, ADAPTER_RATE = 0.0035, 0.003, 0.001
REACHED_FLOOR = 0.1  # of a drafted token's weight
ECHO_SHARE = 0.8  # of the first stage: copying is learned soonest where there is nothing else to learn
REPORT_EVERY, CHECK_EVERY, CHECK_TASKS = 100, 1000, 66


def learn_tokenizer() -> Tokenizer:
    draw = Random("tokenizer")
    tasks = (draw_task(draw, held_out=False) for _ in range(20000))
    texts = (message["content"] for task in tasks for message in task.messages)
    return vocabulary.train(texts, checkpoint.CONFIG["vocab_size"])


def scored(net: Network, batch: Batch, adapter: Adapter | None = None) -> tuple[Tensor, Tensor]:
    """Causal and denoising logits at the scored positions, bf16."""
    hidden = net.hidden(batch.tokens, batch.positions, batch.visible, adapter, batch.drafting).flatten(0, 1)
    return net.diffusion_head(hidden[batch.causal_at]), net.diffusion_head(hidden[batch.noisy_at])


def joint_loss(net: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    causal, noisy = scored(net, batch)
    causal_loss = F.cross_entropy(causal.float(), batch.causal_targets)
    if not len(batch.noisy_at):
        return causal_loss, torch.zeros(())
    return causal_loss, F.cross_entropy(noisy.float(), batch.noisy_targets)


def draft_loss(net: Network, adapter: Adapter, batch: Batch) -> Tensor:
    """Cross entropy of single-pass drafts, plus their divergence from what the verifier would say there.

    A drafted token counts as much as it is likely to be reached: by the chance that all before it are accepted.
    """
    hidden = net.hidden(batch.tokens, batch.positions, batch.visible, adapter, batch.drafting).flatten(0, 1)
    drafts = F.log_softmax(net.diffusion_head(hidden[batch.noisy_at]).float(), -1)
    wrong = F.nll_loss(drafts, batch.noisy_targets, reduction="none")
    with torch.no_grad():
        inside = batch.noisy_reference >= 0
        verifier = F.softmax(net.diffusion_head(hidden[batch.noisy_reference.clamp(min=0)]).float(), -1)
        # Masked tokens lie in order, a block's in a run: the running sum since the block's start is what comes before.
        total = wrong.cumsum(0) - wrong
        starts = torch.ones(len(wrong), dtype=torch.bool)
        starts[1:] = batch.noisy_at.diff() != 1
        reached = torch.exp(total[starts][starts.cumsum(0) - 1] - total) + REACHED_FLOOR
    apart = F.kl_div(drafts, verifier, reduction="none").sum(-1) * inside
    return ((wrong + apart) * reached).sum() / reached.sum()


@torch.no_grad()
def check(net: Network, rows: list[Row], adapter: Adapter | None = None) -> tuple[float, float]:
    """Share of held-out answers whose every token is the greedy choice, and tokens per draft-and-verify round.

    Both on the final answers, teacher-forced: greedy decoding is exact just where every forced choice is right.
    """
    exact, rounds, tokens = 0, 0, 0
    for row in rows:
        start, end = row.answers[-1]
        final = Row(row.tokens, [row.answers[-1]])
        batch = assemble(Random(0), [final], noisy=False, drafts_only=False)
        causal = scored(net, batch)[0].argmax(-1)
        exact += int((causal == batch.causal_targets).all())
        place = start
        while place < end - 1:
            reach = min(place + 32, end)
            block = torch.tensor([row.tokens[place]] + [vocabulary.MASK] * 31)
            ids = torch.cat((torch.tensor(row.tokens[:place]), block))[None]
            visible = torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool).tril()
            visible[place:, place:] = True
            drafting = (torch.arange(len(ids[0])) >= place)[None]
            logits = net(ids, torch.arange(len(ids[0]))[None], visible[None], adapter, drafting)[
                0, place + 1 :
            ]
            right = logits.argmax(-1)[: reach - place - 1] == torch.tensor(row.tokens[place + 1 : reach])
            kept = int(right.long().cumprod(0).sum()) + 1
            tokens += min(kept, end - 1 - place)
            rounds += 1
            place += kept
    return exact / len(rows), tokens / rounds


class Progress:
    """Prints losses, speed and the time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start = time.monotonic()
        self.tokens = 0
        self.losses: list[tuple[float, ...]] = []

    def report(self, step: int, stage: str, batch: Batch, *losses: Tensor) -> None:
        self.tokens += int((~batch.drafting).sum())
        self.losses.append(tuple(float(loss.detach()) for loss in losses))
        if step % REPORT_EVERY:
            return
        means = [sum(column) / len(column) for column in zip(*self.losses, strict=True)]
        spent = time.monotonic() - self.start
        left = spent / step * (self.steps - step)
        shown = " ".join(f"{mean:.4f}" for mean in means)
        speed = f"{self.tokens / spent:.0f} tok/s {left / 60:.0f} min left"
        print(f"{stage} {step}/{self.steps} loss {shown} {speed}", flush=True)
        self.losses.clear()


def train_base(net: Network, tokenizer: Tokenizer, steps: int, rows: list[Row], out: Path) -> None:
    masters = Masters(net)
    progress = Progress(steps)
    draw = Random("base")
    causal_steps = int(steps * AR_SHARE)
    plain: Iterator[Batch] = batches(draw, tokenizer, BATCH_TOKENS, echo_share=ECHO_SHARE)
    noisy: Iterator[Batch] = batches(draw, tokenizer, BATCH_TOKENS, noisy=True)
    for step in range(1, steps + 1):
        batch = next(plain if step <= causal_steps else noisy)
        causal_loss, noisy_loss = joint_loss(net, batch)
        (causal_loss + noisy_loss).backward()  # type: ignore[no-untyped-call]
        share = min(1.0, step / 100, (steps - step + 1) / (steps * DECAY_SHARE))
        masters.step(MUON_RATE * share, ADAM_RATE * share)
        progress.report(step, "base", batch, causal_loss, noisy_loss)
        if step % CHECK_EVERY == 0 or step == steps:
            checkpoint.save_base(out, masters.weights(), tokenizer)
            exact, rate = check(net, rows)
            print(f"held-out: exact {exact:.3f}, drafted tokens per round {rate:.2f}", flush=True)


def train_adapter(net: Network, adapter: Adapter, tokenizer: Tokenizer, steps: int, rows: list[Row]) -> None:
    net.requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.0)
    progress = Progress(steps)
    source = batches(Random("adapter"), tokenizer, BATCH_TOKENS, noisy=True, drafts_only=True)
    for step in range(1, steps + 1):
        batch = next(source)
        loss = draft_loss(net, adapter, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        share = min(1.0, step / 50, (steps - step + 1) / (steps * DECAY_SHARE))
        for group in optimizer.param_groups:
            group["lr"] = ADAPTER_RATE * share
        optimizer.step()
        optimizer.zero_grad()
        progress.report(step, "adapter", batch, loss)
        if step == steps:
            exact, rate = check(net, rows, adapter)
            print(f"held-out: exact {exact:.3f}, drafted tokens per round {rate:.2f}", flush=True)


def initialise(net: Network) -> None:
    spread = checkpoint.CONFIG["initializer_range"]
    for weight in net.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8800, help="optimizer steps of all stages together")
    parser.add_argument("--out", type=Path, default=checkpoint.FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    network.Layer.before = torch.compile(network.Layer.before, dynamic=True)  # type: ignore[method-assign]
    network.Layer.after = torch.compile(network.Layer.after, dynamic=True)  # type: ignore[method-assign]
    tokenizer = learn_tokenizer()
    rows = [encode(tokenizer, task.messages) for task in evaluation_tasks(CHECK_TASKS, seed=2)]
    geometry = Geometry.from_config(checkpoint.CONFIG)
    net = Network(geometry)
    initialise(net)
    net.bfloat16()
    adapter_steps = int(options.steps * ADAPTER_SHARE)
    train_base(net, tokenizer, options.steps - adapter_steps, rows, options.out)
    torch.manual_seed(options.seed)
    adapter = Adapter(geometry, checkpoint.RANK, checkpoint.ALPHA)
    train_adapter(net, adapter, tokenizer, adapter_steps, rows)
    checkpoint.save_adapter(options.out, adapter)


if __name__ == "__main__":
    main()
