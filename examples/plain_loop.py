"""The plain loop: two backward passes a step, the update fused, a learning-rate schedule on the one optimizer.

python examples/plain_loop.py
"""

import torch
from task import batches, network, report
from torch.nn.functional import cross_entropy

from rsaft_fast.optim import SAMAdamW


def main(steps: int = 200) -> torch.nn.Module:
    model = network()
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, max_grad_norm=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for x, y in batches(steps):
        loss = cross_entropy(model(x), y)  # at the weights themselves: the loss to log
        loss.backward()
        with optimizer.perturbed(zero_grad=True):  # weights at w + rho g/||g||; any exception brings w back
            cross_entropy(model(x), y).backward()
            optimizer.step()  # restores and updates in one pass
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.detach())
    stats = optimizer.stats()  # waits for the device: for logging now and then
    report(model, losses, f"grad norm {stats['grad_norm']:.3f}", f"projection {stats['projection']:.3f}")
    return model


if __name__ == "__main__":
    main()
