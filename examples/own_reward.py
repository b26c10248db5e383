"""A reward of your own: how warm a picture is, red against blue.

python examples/own_reward.py
"""

import torch

from rsaft_fast import Reward, finetune
from rsaft_fast.rewards import RewardSpec


class Warmth(Reward):
    """Red less blue, from -1 to 1; the prompt does not matter."""

    spec = RewardSpec("warmth")

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return images.clamp(0, 1)

    def score_inputs(self, inputs: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        red, _, blue = inputs.unbind(1)
        return (red - blue).mean((1, 2)).float()


def main(steps: int = 4, output_dir: str = "runs/own_reward") -> list[float]:
    """Train on it; return its mean over the held-out pictures before and after."""
    means = []
    finetune(
        "playground.yaml",
        [f"max_steps={steps}", f"output_dir={output_dir}", f"samples.every={steps}", "optimizer.lr=5e-4"],
        reward=Warmth(),
        on_samples=lambda trainer, images, step: means.append(trainer.grid_reward(images)),
    )
    print(f"warmth {means[0]:.4f} -> {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    main()
