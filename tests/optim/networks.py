"""A small network with odd sizes, its data, and ways to train it."""

from collections.abc import Callable

import torch

from rsaft_fast.optim.sharpness import SharpnessAware


def network(dtype=torch.float32, seed=0, device="cpu") -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(5, 13), torch.nn.Tanh(), torch.nn.LayerNorm(13), torch.nn.Linear(13, 3))
    return torch.nn.Sequential(*layers).to(device, dtype)


def batches(count: int, dtype=torch.float32, seed=1, device="cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(8, width, generator=generator, dtype=torch.float64).to(device, dtype)

    return [(draw(5), draw(3)) for _ in range(count)]


def loss_of(model, batch) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).pow(2).mean()


def train(model, opt, data, sharp=True, each: Callable = lambda: None) -> None:
    """The plain two-pass loop; one pass with `sharp=False`."""
    for batch in data:
        opt.zero_grad()
        loss_of(model, batch).backward()
        if sharp:
            opt.perturb(zero_grad=True)
            loss_of(model, batch).backward()
        opt.step() if sharp or not isinstance(opt, SharpnessAware) else opt.step(plain=True)
        each()


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().cpu().reshape(-1) for p in model.parameters()])


def bits(model) -> torch.Tensor:
    return torch.cat([p.detach().cpu().reshape(-1).view(torch.uint8) for p in model.parameters()])
