"""Settings of a recipe's section `speed`."""

from __future__ import annotations

from typing import Literal

from rsaft_fast.settings import Settings

Attention = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "xformers", "flash3"]


class SpeedSettings(Settings):
    """Choices that make an update faster without changing what it computes, but for the last bits.

    Attributes:
        cfg: classifier-free guidance as one network call of both branches, which fills a GPU that a small batch leaves
            idle: separate nowhere; rollout in the calls without gradient, whose activations are far below the decoder's
            peak; batched in graded calls too, which keeps the activations of both branches at once: twice the
            denoiser's share of the peak. A detached unconditional branch has no graded call to share.
        compile: torch.compile of the denoiser's repeated blocks: none; rollout for the calls without gradient; all for
            graded calls too. Saves kernel launches and passes over memory, costs half a minute to minutes at the start
            (each picture size and batch size anew). Not with quantised or offloaded weights.
        attention: the denoiser's attention kernels: auto as diffusers has it, which is torch's choice; sdpa torch's
            choice whatever DIFFUSERS_ATTN_BACKEND says; cudnn, flash or efficient one of torch's own, without a
            fallback; xformers and flash3 (FlashAttention 3) where the package and its library load. The VAE keeps
            torch's choice: its one head of 512 channels is beyond most of these kernels.
        cuda_graph: capture the rollout's network call once a shape, and replay it: no kernel is launched one by one,
            which is most of the time of small pictures and batches. Costs the memory of that call's activations for
            the whole run.
        channels_last: hold the convolutions of a UNet and of its VAE's decoder in the layout that tensor cores take,
            which saves a transposition around each; nothing for transformers.
    """

    cfg: Literal["separate", "rollout", "batched"] = "rollout"
    compile: Literal["none", "rollout", "all"] = "none"
    attention: Attention = "auto"
    cuda_graph: bool = False
    channels_last: bool = False

    def portable(self) -> SpeedSettings:
        """Give the settings that hold on every machine and need no warming up."""
        return SpeedSettings(cfg=self.cfg, channels_last=self.channels_last)
