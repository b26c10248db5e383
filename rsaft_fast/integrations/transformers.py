"""Both passes of a sharpness-aware step in a `transformers` Trainer."""

import torch
from transformers import Trainer, TrainerCallback

from rsaft_fast.integrations.accelerate import TwoPasses


class SharpnessCallback(TrainerCallback):
    """Callback that makes each training step of a Trainer, or of any subclass, a two-pass step.

    Usage::

        optimizer = SAMAdamW(model.parameters(), lr=1e-4, rho=0.05)
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        trainer.add_callback(SharpnessCallback(trainer))

    The second pass runs at the end of the step's last micro-batch, before the Trainer clips, so `max_grad_norm` of
    `TrainingArguments` clips the second pass's gradient and `grad_norm` in the logs is its norm: leave the
    optimizer's own `max_grad_norm` at None. The loss in the logs is the first pass's. Gradient accumulation,
    schedulers, mixed precision, DDP, FSDP2, checkpoints and resuming are the Trainer's own.

    A callback is not told of the batches; it therefore stands in for `trainer.training_step` while training runs.

    Args:
        trainer: the one that it is added to.
        sync_first_pass: average the first pass's gradients over DDP workers too (see `TwoPasses`).
    """

    def __init__(self, trainer: Trainer, sync_first_pass: bool = False):
        self.trainer, self.sync_first_pass = trainer, sync_first_pass
        self.one_pass = trainer.training_step
        self.passes: TwoPasses | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        self.passes = TwoPasses(trainer.accelerator, trainer.model_wrapped, trainer.optimizer, self.sync_first_pass)
        trainer.training_step = self.training_step

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.trainer.training_step = self.one_pass
        self.passes = None

    def training_step(self, *args) -> torch.Tensor:
        """Run `Trainer.training_step`; the last micro-batch of a step leaves the second pass's gradients."""
        return self.passes(self.one_pass, *args)  # pyrefly: ignore[not-callable]  # in place between begin and end
