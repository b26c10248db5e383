"""The direction of the weight perturbation eps, where it is not SAM's: cheaper, or better aimed.

The optimizer perturbs along what it finds in `.grad`, of whatever origin: a direction is put there before
`optimizer.perturb()`, so that the fused kernels, the radii and the exact restore are those of SAM. RSA-FT (arXiv
2603.21175, eq. 17) takes the first pass's gradient; here are

- the running mean of the updates' own gradients (momentum-SAM, arXiv 2401.12033), and a direction that is renewed
  every so many updates (LookSAM's interval, arXiv 2203.02714): both save first passes;
- the first pass's gradient less its running mean (friendly SAM, arXiv 2403.12350), and SAM's direction with GSAM's
  change of the update's gradient (arXiv 2203.08065): two passes, as SAM;
- of LoRA, the direction that is steepest in the weight W + s B A, or FMLoRA's (arXiv 2508.00522).

Bi-LoRA's second adapter, which is no direction in the trained weights, is `auxiliary`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from rsaft_fast.distributed.shards import like, local, shard_group, summed
from rsaft_fast.errors import UserError
from rsaft_fast.smoothing.settings import ParameterSmoothing

MEAN_GRADIENT, DIRECTION = "gradient_mean", "direction"
"""What is kept between updates, each a tensor for every parameter: a running mean (fp32), a direction."""

AUXILIARY, AUXILIARY_MEAN, AUXILIARY_SQUARE = "auxiliary", "auxiliary_mean", "auxiliary_square"
"""What Bi-LoRA keeps: the second adapter, and the moments of its own steps."""

KEPT = (MEAN_GRADIENT, DIRECTION, AUXILIARY, AUXILIARY_MEAN, AUXILIARY_SQUARE)
_A, _B = ".lora_A.", ".lora_B."


class Ascent:
    """Puts the direction of eps into `.grad`, and keeps what the next updates' directions follow from.

    Attributes:
        kept: tensors like the parameters (of sharded ones, like this rank's parts), by name, under `MEAN_GRADIENT` and
            `DIRECTION`: what a checkpoint holds.
    """

    def __init__(
        self, settings: ParameterSmoothing, parameters: Mapping[str, torch.nn.Parameter], lora_scale: float = 1.0
    ):
        """
        Args:
            settings: of `smoothing.parameters`.
            parameters: what is trained, by name.
            lora_scale: s of W + s B A, for a space other than the factors'.

        Raises:
            UserError: such a space, of parameters that are no pairs of LoRA's A and B.
        """
        self.settings, self.parameters, self.lora_scale = settings, dict(parameters), lora_scale
        self._pairs = lora_pairs(self.parameters, f"space is {settings.space}") if settings.space != "factor" else []
        self._wanted: torch.Tensor | None = None
        self._first: dict[str, torch.Tensor] = {}
        self._group = shard_group(self.parameters.values())
        self.kept = {name: self._zeros(name) for name in kept_by(settings)}

    def _zeros(self, name: str) -> dict[str, torch.Tensor]:
        wide = name == MEAN_GRADIENT
        return {
            key: torch.zeros_like(local(p), dtype=_at_least_fp32(p.dtype) if wide else p.dtype, requires_grad=False)
            for key, p in self.parameters.items()
        }

    def looks_first(self, number: int) -> bool:
        """Whether update `number` (from 0) makes a first pass at theta."""
        return self.settings.direction != "momentum" and number % self.settings.reuse == 0

    @torch.no_grad()
    def turn(self) -> None:
        """Replace the first pass's gradient in `.grad` by the direction that follows from it."""
        settings, gradients = self.settings, self._gradients()
        if settings.direction == "friendly":
            mean = self.kept[MEAN_GRADIENT]
            self._take_up(gradients)
            gradients = {name: g - (settings.sigma * mean[name]).to(g.dtype) for name, g in gradients.items()}
        elif settings.direction == "gsam":
            self._first = gradients
        if settings.space != "factor":
            gradients = self._in_the_weight(gradients)
        if settings.reuse > 1:
            finite = self._all_finite(gradients)
            for name, kept in self.kept[DIRECTION].items():
                kept.copy_(torch.where(finite, gradients.get(name, torch.zeros_like(kept)), kept))
        if settings.space != "factor" or settings.direction == "friendly":
            self._put(gradients)

    @torch.no_grad()
    def recall(self) -> None:
        """Put the direction that is kept into `.grad`, in an update without a first pass."""
        if self.settings.direction == "momentum":
            kept = self.kept[MEAN_GRADIENT]
            kept = self._in_the_weight(kept) if self.settings.space != "factor" else kept
        else:
            kept = self.kept[DIRECTION]
        # A copy: the optimizer may keep the old weights in the memory of what it finds.
        self._put({name: tensor.to(self.parameters[name].dtype, copy=True) for name, tensor in kept.items()})

    @torch.no_grad()
    def finish(self) -> None:
        """Take up the update's own gradient, and change it where the direction says so."""
        gradients = self._gradients()
        if self.settings.direction == "momentum":
            self._take_up(gradients)
        elif self.settings.direction == "gsam":
            first, self._first = self._first, {}
            self._leave_gap(first, gradients)

    @contextmanager
    def scaled(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Let the optimizer, which measures eps as it lies in the factors, apply one of rho in the weight W.

        Waits for the device, where the space is full.
        """
        ratio = self._length_ratio()
        if ratio == 1:
            yield
            return
        radii = [group["rho"] for group in optimizer.param_groups]
        for group, rho in zip(optimizer.param_groups, radii):
            group["rho"] = rho * ratio
        try:
            yield
        finally:
            for group, rho in zip(optimizer.param_groups, radii):
                group["rho"] = rho

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def _put(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else like(parameter, gradient)

    def _all_finite(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Whether every value is finite, on every rank, as a scalar on the device."""
        bad = [(~torch.isfinite(tensor)).sum() for tensor in tensors.values()]
        return summed(torch.stack(bad).sum(), self._group) == 0 if bad else torch.tensor(True)

    def _take_up(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Move the running mean, unless a gradient is not finite: the optimizer skips such an update, too."""
        finite = self._all_finite(gradients)
        for name, mean in self.kept[MEAN_GRADIENT].items():
            g = gradients[name].to(mean.dtype) if name in gradients else torch.zeros_like(mean)
            mean.add_(torch.where(finite, g, mean) - mean, alpha=1 - self.settings.decay)

    def _leave_gap(self, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
        """Take alpha times the part of `first` that is orthogonal to `second` off `second` (GSAM)."""
        both = [name for name in second if name in first]
        if not both:
            return
        dot, square = summed(
            torch.stack(
                [
                    torch.stack([(a[name].double() * second[name].double()).sum() for name in both]).sum()
                    for a in (first, second)
                ]
            ),
            self._group,
        )
        along, alpha = torch.where(square > 0, dot / square, 0.0), self.settings.alpha
        for name in both:
            g = second[name]
            g.mul_((1 + alpha * along).to(g.dtype)).sub_(alpha * first[name])

    def _in_the_weight(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the change of B, up to a common factor, that the space asks for."""
        return self._steepest(gradients) if self.settings.space == "full" else self._transferred(gradients)

    def _transferred(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return FMLoRA's change of B (eqs. 10 to 15), and remember the length of the estimate that it follows from.

        With G = dr/dW, the factors' gradients are s G A^T and s B^T G. The estimate of G is
        H = (dr/dB (A^T)^+ + (B^T)^+ dr/dA) / 2s = (G P_A + P_B G) / 2, P the projections onto A's rows and B's columns,
        and eps in W is rho H / |H|; B takes s^-1 of it times A^+. Nothing of W's size is made.
        """
        found, squares = {}, []
        for a, b in self._pairs:
            if b not in gradients:
                continue
            g_b = gradients[b].flatten(1).double()
            rows = self.parameters[a].detach().flatten(1).double()
            columns = self.parameters[b].detach().flatten(1).double()
            g_a = gradients[a].flatten(1).double() if a in gradients else torch.zeros_like(rows)
            inner_a, inner_b = (
                torch.linalg.pinv(gram, hermitian=True) for gram in (rows @ rows.T, columns.T @ columns)
            )
            through_b = columns @ inner_b  # (B^T)^+
            first = g_b @ inner_a  # dr/dB (A^T)^+ without its A
            # |first A|^2 + |through_b g_a|^2 + 2 <first A, through_b g_a>
            squares.append((first * g_b).sum())
            squares.append(((inner_b @ g_a) * g_a).sum())
            squares.append(2 * ((first.T @ through_b) * (rows @ g_a.T)).sum())
            direction = first + through_b @ (g_a @ rows.T) @ inner_a
            found[b] = direction.to(gradients[b].dtype).view_as(gradients[b])
        # Both are without the same factor, 1 / 2s.
        self._wanted = torch.stack(squares).sum().clamp_min(0).sqrt() if squares else None
        return found

    def _steepest(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the change of B that is steepest in W: dB = (dr/dB) (A A^T)^-1 / s^2, up to a common factor.

        With G = dr/dW, dr/dB = s G A^T, and s dB A = G P with P the projection onto A's rows.
        """
        found = {}
        for a, b in self._pairs:
            if b in gradients:
                gram = self._gram(a)
                # A row of zeros cannot be perturbed along; without this nothing else could either.
                gram.diagonal().add_(1e-12 * gram.diagonal().mean())
                inverse, _ = torch.linalg.inv_ex(gram)
                g = gradients[b]
                found[b] = (g.flatten(1).double() @ inverse).to(g.dtype).view_as(g)
        return found

    def _gram(self, a: str) -> torch.Tensor:
        """A A^T, (r, r) in float64."""
        rows = self.parameters[a].detach().flatten(1).double()
        return rows @ rows.T

    @torch.no_grad()
    def _length_ratio(self) -> float:
        """The length of what `.grad` holds over that of the change of W that it makes, or is to make."""
        if not self._pairs:
            return 1.0
        if self.settings.space == "transferred":
            present = [self.parameters[b].grad for _, b in self._pairs]
            held = [g.double().square().sum() for g in present if g is not None]
            if not held or self._wanted is None:
                return 1.0
            return _usable(torch.stack(held).sum().sqrt() / (self.lora_scale * self._wanted))
        own, made = [], []
        for a, b in self._pairs:
            g = self.parameters[b].grad
            if g is not None:
                g = g.flatten(1).double()
                own.append(g.square().sum())
                # |s g A|^2, without the matrix of W's size.
                made.append(self.lora_scale**2 * ((g @ self._gram(a)) * g).sum())
        if not own:
            return 1.0
        return _usable((torch.stack(own).sum() / torch.stack(made).sum()).sqrt())


def kept_by(settings: ParameterSmoothing) -> tuple[str, ...]:
    """Name what is kept between updates."""
    mean = settings.direction in ("momentum", "friendly")
    return (MEAN_GRADIENT,) * mean + (DIRECTION,) * (settings.reuse > 1)


def needs_ascent(settings: ParameterSmoothing | None) -> bool:
    """Whether the direction of eps is other than the gradient of this update's own first pass."""
    return settings is not None and (
        settings.direction != "gradient" or settings.reuse > 1 or settings.space != "factor"
    )


def _usable(ratio: torch.Tensor) -> float:
    """1 where it is of nothing, or of what is not finite: then nothing is perturbed, whatever the radius."""
    return 1.0 if ratio.is_meta else torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).item()


def lora_pairs(parameters: Mapping[str, torch.nn.Parameter], asked: str) -> list[tuple[str, str]]:
    """Pair the names of LoRA's A and B.

    Args:
        asked: what needs them, as `smoothing.parameters` has it.

    Raises:
        UserError: a parameter is none of them.
    """
    pairs = [(name, name.replace(_A, _B)) for name in parameters if _A in name]
    paired = {name for pair in pairs for name in pair}
    if odd := next((name for name in parameters if name not in paired), None) or ("" if pairs else "nothing"):
        raise UserError(
            f"smoothing.parameters.{asked}, and {odd} is no factor of a LoRA: set parameters.train=lora, or take "
            "direction gradient and space factor, which is the weight's own where it is trained itself"
        )
    return pairs


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
