"""NVIDIA's published models: their names, their geometries, and how many tokens a forward of theirs commits."""

from dataclasses import dataclass
from pathlib import Path

from engine.config import ModelConfig

FOLDER = Path(__file__).parent / "models"  # its README says where the geometries come from


@dataclass(frozen=True, slots=True)
class Published:
    """linear, quadratic, diffusion: tokens per forward, means of ten tasks, of the instruct model with its draft
    adapter and blocks of 32 (arXiv 2607.05722, tables 5 to 7)."""

    repository: str
    commit: str
    file: str
    linear: float
    quadratic: float
    diffusion: float

    def geometry(self) -> ModelConfig:
        return ModelConfig.from_json(FOLDER / self.file)


SMALL, MIDDLE, LARGE = PUBLISHED = (
    Published("nvidia/Nemotron-Labs-Diffusion-3B", "0d51902da1f8869f83413ce642fab402fa5641e0",
              "nld_3b_config.json", linear=4.36, quadratic=5.42, diffusion=1.91),
    Published("nvidia/Nemotron-Labs-Diffusion-8B", "16c67f0560b912e93e0cabb6e0c4f5c3086d95fc",
              "nld_8b_config.json", linear=5.99, quadratic=6.38, diffusion=2.57),
    Published("nvidia/Nemotron-Labs-Diffusion-14B", "f8c3e2c078e193599b8882d965b1001c456ba738",
              "nld_14b_config.json", linear=5.96, quadratic=6.92, diffusion=2.74),
)  # fmt: skip


def nearest(model: ModelConfig) -> Published:
    """The published model of a geometry; for another geometry the largest."""
    for published in PUBLISHED:
        if published.geometry() == model:
            return published
    return LARGE
