"""Mixed precision: fp16 autocast and GradScaler around both passes, and nothing to unscale by hand.

The first pass's gradient only gives a direction, g / ||g||, so its scale cancels; the second pass's is unscaled inside
the fused step. When a gradient overflows in either pass, the whole step is skipped and the scaler lowers its scale.

python examples/amp_gradscaler.py
"""

import torch
from task import DEVICE, batches, network, report
from torch.nn.functional import cross_entropy

from rsaft_fast.optim import SAMAdamW


def main(steps: int = 200, init_scale: float = 2.0**16) -> torch.nn.Module:
    model = network()
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, max_grad_norm=0.3)  # clips what was unscaled
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=init_scale)

    def backward(x, y):
        with torch.autocast(DEVICE.type, torch.float16):  # one context a pass: it caches the casts of the weights
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss.detach()

    losses = []
    for x, y in batches(steps):
        losses.append(backward(x, y))
        with optimizer.perturbed(zero_grad=True):
            backward(x, y)
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    report(model, losses, f"scale {scaler.get_scale():.0f}", f"skipped {int(optimizer.skipped)}")
    return model


if __name__ == "__main__":
    main()
