"""Optimizers: Muon for the layers' matrices, AdamW for the rest, over fp32 masters of a bf16 network."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
DECAY = 0.01


def orthogonal(update: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five quintic Newton-Schulz steps in bf16. `update` [k, m, n]."""
    x: Tensor = update.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Nesterov momentum whose direction is orthogonalised, with decoupled weight decay, on matrices [k, m, n]."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.moving = torch.zeros_like(weights)

    def step(self, grads: Tensor, rate: float) -> None:
        self.moving.lerp_(grads, 1 - MOMENTUM)
        update = orthogonal(grads.lerp(self.moving, MOMENTUM))
        stretch = max(1.0, self.weights.shape[1] / self.weights.shape[2]) ** 0.5
        self.weights.mul_(1 - rate * DECAY).add_(update.float(), alpha=-rate * stretch)


class Masters:
    """fp32 copies of a bf16 network's parameters and the optimizers that move them."""

    def __init__(self, network: nn.Module) -> None:
        self.live = dict(network.named_parameters())
        kinds: dict[str, list[str]] = defaultdict(list)
        for name, weight in self.live.items():
            if weight.ndim == 2 and ".layers." in name:
                kinds[name.split(".", 3)[3]].append(name)
        self.kinds = list(kinds.values())
        self.muons = [
            Muon(torch.stack([self.live[n].detach().float() for n in names])) for names in self.kinds
        ]
        matrices = {name for names in self.kinds for name in names}
        self.others = {
            n: w.detach().float().requires_grad_() for n, w in self.live.items() if n not in matrices
        }
        self.adam = torch.optim.AdamW(list(self.others.values()), betas=(0.9, 0.95), weight_decay=0.0)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter in fp32."""
        pairs = zip(self.kinds, self.muons, strict=True)
        stacked = {name: muon.weights[i] for names, muon in pairs for i, name in enumerate(names)}
        return {**stacked, **self.others}

    @torch.no_grad()
    def step(self, muon_rate: float, adam_rate: float) -> None:
        """One update from the network's bf16 gradients, which are cleared."""
        for names, muon in zip(self.kinds, self.muons, strict=True):
            muon.step(torch.stack([self.gradient(name) for name in names]), muon_rate)
        for name, weight in self.others.items():
            weight.grad = self.gradient(name)
        for group in self.adam.param_groups:
            group["lr"] = adam_rate
        self.adam.step()
        for name, weight in self.weights().items():
            self.live[name].copy_(weight)
            self.live[name].grad = None

    def gradient(self, name: str) -> Tensor:
        grad = self.live[name].grad
        assert grad is not None
        return grad.float()
