"""Batch-norm statistics that a two-pass step updates once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_batch_norm_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Keep the running statistics of `model` as they are: for the second pass of a sharpness-aware step.

    The second pass sees the same data at `w + e`; with its statistics too, every batch would count twice, once at
    weights that nobody keeps. Normalisation itself does not change: layers in training mode use the statistics of
    their batch, layers in evaluation mode the running ones.

    Covers BatchNorm, SyncBatchNorm and InstanceNorm with running statistics, of any dimension. Blocks nest, and an
    exception leaves them in order. Enter after `model.train()`: a mode switched inside the block is not followed.
    With activation checkpointing the backward belongs inside, as it runs the layers again. A compiled model is
    compiled once more, the first time, and not after.

    Args:
        model: any module, compiled and wrapped (DDP) ones too.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _NormBase)]
    tracking = [layer for layer in layers if layer.training and layer.track_running_stats]
    batch = [layer for layer in tracking if not isinstance(layer, _InstanceNorm)]
    # InstanceNorm hands its statistics to the kernel whatever the flag says: there they are put aside.
    instance = [layer for layer in tracking if isinstance(layer, _InstanceNorm)]
    aside = [{name: layer._buffers[name] for name in RUNNING} for layer in instance]
    try:
        for layer in batch:
            layer.track_running_stats = False
        for layer in instance:
            layer._buffers.update(dict.fromkeys(RUNNING))
        yield
    finally:
        for layer in batch:
            layer.track_running_stats = True
        for layer, statistics in zip(instance, aside):
            layer._buffers.update(statistics)
