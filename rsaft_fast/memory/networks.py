"""Choice of a pipeline's networks, and of the denoiser's blocks, that recompute activations in the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest

from torch import nn
from torch.utils.checkpoint import checkpoint

from rsaft_fast.errors import UserError
from rsaft_fast.memory.checkpointing import checkpoint_calls, checkpoint_vae_decoder, keep_calls
from rsaft_fast.memory.decoder import decode_in_strips
from rsaft_fast.memory.offload import transformer_blocks


def checkpoint_networks(denoiser: nn.Module, vae: nn.Module, names: Collection[str], keep_blocks: int = 0) -> None:
    """Apply a recipe's `backbone.checkpoint` and `backbone.keep_blocks`.

    Raises:
        UserError: more blocks are kept than there are, or a VAE that cannot decode in strips.
    """
    if "denoiser" in names:
        checkpoint_denoiser(denoiser, keep_blocks=keep_blocks)
    if "decoder" in names:
        checkpoint_vae_decoder(vae)
    if "decoder-strips" in names:
        decode_in_strips(vae)


_LEFT_OUT = ("Krea2TextFusionBlock",)
"""Classes of blocks that diffusers does not checkpoint. Krea-2's work on twelve layers of every token of the text: of
512 tokens they keep 1.4 GiB under LoRA and 2.1 in full training, and their inputs are 0.07."""


def checkpoint_denoiser(denoiser: nn.Module, enabled: bool = True, keep_blocks: int = 0) -> None:
    """Turn a diffusers denoiser's own per-block checkpointing on or off; it acts under `eval()` too.

    Blocks that diffusers leaves out are checkpointed as well, by this package.

    Args:
        keep_blocks: blocks, counted from the last one, that keep their activations. The backward pass comes to them
            first, and has dropped their activations by the time it recomputes the others: at its peak are theirs, the
            inputs of all others, and one block's own work.

    Raises:
        UserError: there are fewer blocks.
    """
    beside = [module for module in denoiser.modules() if type(module).__name__ in _LEFT_OUT]
    if not enabled:
        keep_calls(beside)
        denoiser.disable_gradient_checkpointing()
        return
    blocks = list(denoiser_blocks(denoiser))
    if keep_blocks > len(blocks):
        raise UserError(
            f"backbone.keep_blocks is {keep_blocks}; this {type(denoiser).__name__} has {len(blocks)} blocks (to keep "
            "all of them, leave denoiser out of backbone.checkpoint)"
        )
    checkpoint_calls(beside)
    denoiser.enable_gradient_checkpointing(_CheckpointedCall(blocks[len(blocks) - keep_blocks :]))


class _CheckpointedCall:
    """Call of a block under diffusers' checkpointing; blocks that are kept are simply called.

    An object, not a closure: a deep copy of the network takes its own blocks along.
    """

    def __init__(self, kept: Iterable[nn.Module]):
        self.kept = list(kept)

    def __call__(self, block: nn.Module, *args):
        if any(block is module for module in self.kept):
            return block(*args)
        # A block in eval() draws nothing random, and saving the generator's state would synchronise the device.
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=block.training)


def denoiser_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """List the blocks that diffusers checkpoints one by one, in the order in which they run.

    Of a transformer its blocks; of a UNet the resnets (but for the first of the middle, which diffusers leaves out) and
    the transformer blocks between them.
    """
    if not hasattr(denoiser, "down_blocks"):
        yield from transformer_blocks(denoiser).values()
        return
    for part in denoiser.down_blocks:
        yield from _pairs(part.resnets, getattr(part, "attentions", ()))
    if denoiser.mid_block is not None:
        middle = list(_pairs(denoiser.mid_block.resnets, getattr(denoiser.mid_block, "attentions", ())))
        yield from middle[1:]
    for part in denoiser.up_blocks:
        yield from _pairs(part.resnets, getattr(part, "attentions", ()))


def sharded_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """List the parts of a denoiser whose weights are gathered apart from each other where they are in shards.

    The blocks of `denoiser_blocks`, and of a UNet what is large beside them: the first resnet of the middle, and the
    convolutions between resolutions.
    """
    yield from denoiser_blocks(denoiser)
    if not hasattr(denoiser, "down_blocks"):
        return
    if denoiser.mid_block is not None:
        yield denoiser.mid_block.resnets[0]
    for part in denoiser.down_blocks:
        yield from getattr(part, "downsamplers", None) or ()
    for part in denoiser.up_blocks:
        yield from getattr(part, "upsamplers", None) or ()


def _pairs(resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for resnet, attention in zip_longest(resnets, attentions):
        yield resnet
        if attention is not None:
            yield from attention.transformer_blocks
