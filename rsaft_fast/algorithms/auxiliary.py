"""Bi-LoRA: the weight perturbation in a second adapter that climbs while the trained one descends (arXiv 2508.19564).

With W + s B A + s B2 A2, one backward pass at that weight gives both adapters' gradients: A and B go down the loss by
the optimizer, A2 and B2 up it, and are then scaled by sqrt(rho / c) each where c = |s B2 A2|, over all layers, exceeds
rho (eqs. 9 and 10). There is no second pass, and eps is not confined to what A and B can make.

The paper's steps are a gradient's, at the trained adapter's learning rate, which is AdamW's; so is the second adapter's
step here: the optimizer's own rule reversed, without weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from rsaft_fast.algorithms.ascent import AUXILIARY, AUXILIARY_MEAN, AUXILIARY_SQUARE, lora_pairs
from rsaft_fast.backbones.lora_linear import beside, takes_more
from rsaft_fast.errors import UserError
from rsaft_fast.sampling import derive_rng
from rsaft_fast.smoothing.settings import ParameterSmoothing


class AuxiliaryAdapter:
    """Second adapters of the trained ones' shapes; they are in the network inside `attached()` alone.

    Attributes:
        kept: by name, and the names of the parameters that they are like: what a checkpoint holds.
        tensors: the adapters' matrices; backward passes fill their `.grad`.
    """

    def __init__(
        self,
        settings: ParameterSmoothing,
        network: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        lora_scale: float = 1.0,
        seed: int = 0,
    ):
        """
        Args:
            network: whose low-rank layers the parameters are in, by its own names.
            lora_scale: s of W + s B A.
            seed: of A2, which is Gaussian as A is; B2 is zero.

        Raises:
            UserError: parameters that are no pairs of LoRA's A and B, or an adapter of another layer than a linear one.
        """
        self.settings, self.lora_scale = settings, lora_scale
        self._pairs = lora_pairs(parameters, "direction is bi_lora")
        self._layers = [network.get_submodule(a.partition(".lora_A.")[0]) for a, _ in self._pairs]
        for (a, _), layer in zip(self._pairs, self._layers):
            if not takes_more(layer):
                raise UserError(
                    f"smoothing.parameters.direction is bi_lora, and {a} is no linear layer's: leave it out of "
                    "parameters.lora.targets, or take another direction"
                )
        zeros = lambda: {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}  # noqa: E731
        self.kept = {AUXILIARY: zeros(), AUXILIARY_MEAN: zeros(), AUXILIARY_SQUARE: zeros()}
        generator = torch.Generator().manual_seed(int(derive_rng(seed, 0, "auxiliary").integers(2**62)))
        for a, _ in self._pairs:
            own = self.kept[AUXILIARY][a]
            drawn = torch.randn(own.shape, generator=generator, device="cpu") / own.shape[0]
            own.copy_(drawn.to(own.device))
        for tensor in self.tensors:
            tensor.requires_grad_(True)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self.kept[AUXILIARY].values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the network compute with the second adapters, and their gradients be accumulated."""
        own = self.kept[AUXILIARY]
        for tensor in self.tensors:
            tensor.grad = None
        with ExitStack() as stack:
            for layer, (a, b) in zip(self._layers, self._pairs):
                stack.enter_context(beside(layer, own[a], own[b]))
            yield

    @torch.no_grad()
    def climb(self, optimizer: torch.optim.Optimizer, number: int) -> dict[str, float]:
        """Go up the loss by one step, back into the ball; nothing moves where a gradient is not finite.

        Args:
            optimizer: whose rule, learning rate and betas are taken: Adam's where it has betas, else the gradient.
            number: of the update, from 0.

        Returns:
            `eps_norm`: the length of s B2 A2 that the pass just made was taken at.
        """
        before = self._length()
        group = optimizer.param_groups[0]
        lr = group["lr"] if self.settings.auxiliary_lr is None else self.settings.auxiliary_lr
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors]
        finite = torch.stack([torch.isfinite(g).all() for g in gradients]).all()
        for name, g in zip(self.kept[AUXILIARY], gradients):
            own = self.kept[AUXILIARY][name]
            own.copy_(torch.where(finite, own + lr * self._step(name, g, finite, group, number), own))
            own.grad = None
        scale = (self.settings.rho / self._length()).clamp(max=1).sqrt()
        # Where there is nothing yet the length is 0, and the scale 1.
        for tensor in self.tensors:
            tensor.mul_(scale.to(tensor.dtype))
        return {"eps_norm": 0.0 if before.is_meta else float(before)}

    def _step(self, name: str, g: torch.Tensor, finite: torch.Tensor, group: dict, number: int) -> torch.Tensor:
        if "betas" not in group:
            return g
        mean, square = self.kept[AUXILIARY_MEAN][name], self.kept[AUXILIARY_SQUARE][name]
        beta1, beta2 = group["betas"]
        for kept, new, beta in ((mean, g, beta1), (square, g * g, beta2)):
            kept.copy_(torch.where(finite, beta * kept + (1 - beta) * new, kept))
        unbiased = mean / (1 - beta1 ** (number + 1))
        return unbiased / ((square / (1 - beta2 ** (number + 1))).sqrt() + group["eps"])

    def _length(self) -> torch.Tensor:
        """|s B2 A2| over all layers, in float64, without a matrix of W's size."""
        own, squares = self.kept[AUXILIARY], []
        for a, b in self._pairs:
            rows, columns = (own[name].detach().flatten(1).double() for name in (a, b))
            squares.append(((columns.T @ columns) * (rows @ rows.T)).sum())
        return self.lora_scale * torch.stack(squares).sum().clamp_min(0).sqrt()
