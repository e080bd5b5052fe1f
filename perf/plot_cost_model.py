"""Draws what a step of the 14B costs on a B200: the published sweep, the model made from it, and the roofline.

Run: `python -m perf.plot_cost_model`. Needs the perf extra.
"""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cost_model import KV_BYTES_14B, CostModel

SWEEP = Path(__file__).parent / "data" / "b200_14b_forward_sweep.csv"
FIGURE = Path(__file__).parent / "results" / "b200_14b_cost.svg"
# Of the 14B in bf16: bytes read by every forward (all but the embedding), FLOPs of a query token without attention, and
# of its attention to one context token. Of a B200: bytes and dense bf16 FLOPs a second.
WEIGHT_BYTES, TOKEN_FLOPS, ATTENTION_FLOPS = 25.67e9, 25.67e9, 655_360
BANDWIDTH, PEAK = 8e12, 2.2e15
HISTORY = 800  # cached tokens of a sequence, about the sweep's mean


def roofline_seconds(query_tokens: NDArray[np.float64], history: float, block: int) -> NDArray[np.float64]:
    """The least that a step of blocks can take: its bytes, or its arithmetic."""
    bytes_read = WEIGHT_BYTES + KV_BYTES_14B * history * query_tokens / block
    flops = query_tokens * (TOKEN_FLOPS + ATTENTION_FLOPS * history)
    return np.maximum(bytes_read / BANDWIDTH, flops / PEAK)


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "triserve"
    from matplotlib import pyplot

    with SWEEP.open(newline="") as file:
        rows = list(csv.DictReader(file))
    model = CostModel.from_sweep(rows)
    tokens = np.geomspace(1, 8192, 400)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for block, marker in ((8, "o"), (16, "s"), (32, "^")):
        own = [row for row in rows if int(row["block"]) == block]
        x, y = [int(row["query_tokens"]) for row in own], [float(row["mean_ms"]) for row in own]
        axes.plot(x, y, marker, markersize=3, alpha=0.5, label=f"measured, blocks of {block}")
    seconds = model.curve(tokens, tokens / 16 * HISTORY)
    axes.plot(tokens, seconds * 1e3, "k", linewidth=1.2, label="model, blocks of 16")
    floor = roofline_seconds(tokens, HISTORY, 16)
    axes.plot(tokens, floor * 1e3, "k--", linewidth=1, label="roofline, blocks of 16")
    axes.set(xscale="log", yscale="log", xlabel="query tokens of a step", ylabel="ms",
             title=f"Nemotron-Labs-Diffusion 14B, one B200, bf16, {HISTORY} cached tokens a sequence")  # fmt: skip
    axes.set_xticks([2**i for i in range(14)], [str(2**i) for i in range(14)])
    axes.set_yticks([3, 5, 10, 20, 50, 100, 200], ["3", "5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURE, metadata={"Date": None})
    text = FIGURE.read_text()
    FIGURE.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    main()
