"""Gradient accumulation: every micro-batch of the first pass, one perturbation, every micro-batch again, one step.

The perturbation belongs to the gradient of the whole batch; perturbing for each micro-batch would be another method
(m-sharpness), and stepping for each no accumulation. Only inputs are kept between the passes, no graphs.

python examples/gradient_accumulation.py
"""

import torch
from task import batches, network, report
from torch.nn.functional import cross_entropy

from rsaft_fast.optim import SAMAdamW


def main(steps: int = 200, micro_batches: int = 4) -> torch.nn.Module:
    model = network()
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, max_grad_norm=0.3)

    def accumulate(parts):
        losses = []
        for x, y in parts:
            loss = cross_entropy(model(x), y) / len(parts)  # mean over the whole batch
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    losses = []
    for x, y in batches(steps):
        parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches)))
        losses.append(accumulate(parts))
        with optimizer.perturbed(zero_grad=True):
            accumulate(parts)
            optimizer.step()
        optimizer.zero_grad()
    report(model, losses, f"{micro_batches} micro-batches a step")
    return model


if __name__ == "__main__":
    main()
