"""Hugging Face accelerate: prepare(), accumulate(), clipping and a scheduler, as without SAM, around ``TwoPasses``.

``prepare`` wraps the optimizer: ``step`` and ``zero_grad`` are called on the wrapper, which leaves them out between
micro-batches; ``perturb``, ``stats`` and ``skipped`` are the inner optimizer's (``passes.optimizer``).

python examples/accelerate_loop.py            accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from task import batches, network, report
from torch.nn.functional import cross_entropy

from rsaft_fast.integrations.accelerate import TwoPasses
from rsaft_fast.optim import SAMAdamW


def main(steps: int = 200, micro_batches: int = 4, **options) -> torch.nn.Module:
    accelerator = Accelerator(gradient_accumulation_steps=micro_batches, **options)
    model = network()
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    examples = torch.utils.data.TensorDataset(*(torch.cat(parts).cpu() for parts in zip(*batches(steps))))
    loader = torch.utils.data.DataLoader(examples, batch_size=64 // micro_batches)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    passes = TwoPasses(accelerator, model, optimizer)

    def forward_backward(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)  # divides by the number of micro-batches, scales for fp16
        return loss.detach()

    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            losses.append(passes(forward_backward, x, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)  # the second pass's gradient
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        report(model, losses, f"projection {passes.optimizer.stats()['projection']:.3f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
