"""Both passes of a sharpness-aware step inside `accelerator.accumulate()`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from rsaft_fast.distributed.shards import is_sharded
from rsaft_fast.optim.sharpness import SharpnessAware

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = TypeVar("Loss")


class TwoPasses:
    """Runner of both passes: it calls the forward and backward of each micro-batch, perturbs, and calls all again.

    What follows it in the loop stays as it was: the gradients it leaves are those of the second pass, so
    `accelerator.clip_grad_norm_` clips the right ones, and `optimizer.step()` restores and updates::

        passes = TwoPasses(accelerator, model, optimizer)        # after accelerator.prepare
        for batch in loader:
            with accelerator.accumulate(model):
                loss = passes(forward_backward, batch)           # calls accelerator.backward(loss), returns the loss
                optimizer.step()
                optimizer.zero_grad()

    Under DDP each worker's first pass stays its own (m-sharpness, arXiv 2010.01412 section 4.1), without
    communication; only the last backward of the second pass averages gradients. The workers agree on skipping: an
    optimizer that was not told of them (`replicas`) learns of the model's group here. Under FSDP2 a rank's own gradient
    lies in no shard, so that both passes sum over the workers. The micro-batches of one step are kept until its second
    pass.

    Args:
        accelerator: the one that prepared the others.
        model: as prepared. optimizer: `SAM` or `SAMAdamW`, prepared or not.
        sync_first_pass: average the first pass's gradients over the workers as well: every worker then perturbs alike,
            as one process with the joint batch would. Always so under FSDP2.

    Raises:
        TypeError: another optimizer.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        sync_first_pass: bool = False,
    ):
        self.accelerator, self.model = accelerator, model
        self.sync_first_pass = sync_first_pass or any(map(is_sharded, model.parameters()))
        self.optimizer = unwrapped(optimizer)
        self._micro_batches: list[tuple] = []
        is_ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        if is_ddp and self.optimizer.replicas is None and self.optimizer.process_group is None:
            self.optimizer.replicas = model.process_group

    def __call__(self, forward_backward: Callable[..., Loss], *args) -> Loss:
        """Run one micro-batch of the first pass and, if it completes the step, the second pass.

        An exception in either drops what the step has gathered: weights are restored, gradients cleared. (In a released
        backward it leaves a half step: see `SAMAdamW`.) So does a step that the loop did not take before the next.

        Args:
            forward_backward: computes the loss of `args`, calls `accelerator.backward` and returns the loss.

        Returns:
            What `forward_backward` returned in the first pass: the loss at the weights themselves.
        """
        if self.optimizer.is_perturbed:  # a step that was never taken: the loop passed over it
            self.optimizer.restore()
        try:
            with self._synced(self.sync_first_pass and self.accelerator.sync_gradients):
                loss = forward_backward(*args)
            self._micro_batches.append((forward_backward, args))
            if self.accelerator.sync_gradients:
                self._second_pass()
        except BaseException as error:
            self._micro_batches.clear()
            self.model.zero_grad()
            self.optimizer._abandon(error)
            raise
        return loss

    def _second_pass(self) -> None:
        self.optimizer.perturb()
        self.model.zero_grad()
        for left, (forward_backward, args) in zip(reversed(range(len(self._micro_batches))), self._micro_batches):
            with self._synced(left == 0):
                forward_backward(*args)
        self._micro_batches.clear()

    def _synced(self, synced: bool) -> contextlib.AbstractContextManager:
        # Around the forward too: DDP decides there whether the coming backward communicates.
        return contextlib.nullcontext() if synced else self.accelerator.no_sync(self.model)


def unwrapped(optimizer: torch.optim.Optimizer) -> SharpnessAware:
    """Give the `SAM` or `SAMAdamW` inside what `accelerator.prepare` made of it.

    `perturb` and `stats` are its own.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, SharpnessAware):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"{type(inner).__name__} makes no second pass: prepare SAM or SAMAdamW of rsaft_fast.optim")
        inner = inner.optimizer
    return inner
