"""The examples' task: a small network learns the labels that a fixed random network gives."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(seed: int = 0, width: int = 64) -> torch.nn.Module:
    """A classifier of 16 numbers into 4 classes."""
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(16, width), torch.nn.GELU(), torch.nn.Linear(width, 4))
    return torch.nn.Sequential(*layers).to(DEVICE)


def batches(count: int, size: int = 64, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` pairs of inputs ``(size, 16)`` and labels ``(size,)``."""
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(count, size, 16, generator=torch.Generator().manual_seed(seed))
    return [(x.to(DEVICE), (x @ teacher).argmax(1).to(DEVICE)) for x in inputs]


def report(model: torch.nn.Module, losses: list[torch.Tensor], *more: str) -> None:
    """The line of numbers that each example ends with."""
    [(x, y)] = batches(1, size=1000, seed=2)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(
        f"loss {losses[0].item():.3f} -> {losses[-1].item():.3f}, accuracy {accuracy:.3f} (by chance 0.25)",
        *more,
        sep=", ",
    )
