"""Released gradients: the fused step inside the second backward, which uses and frees each gradient as it arrives."""

import functools
from typing import Any

import torch

from rsaft_fast import ops
from rsaft_fast.abi.table import WeightsChangedError, to_device
from rsaft_fast.optim.buckets import Bucket, in_layout_of


class GradientRelease:
    """Hooks that step every parameter when autograd has completed its gradient.

    The weights' update, and the restore in it, then need the gradient of one layer at a time. What must be known of the
    whole step before (the skip flag, the clipping factor) follows from the first pass's norm and from what
    `SAMAdamW.check_finite` was shown.

    Args:
        buckets: of the optimizer. norm: the first pass's. scalars: hyper-parameters and skip flag.
    """

    def __init__(self, buckets: list[Bucket], norm: ops.GradientNorm, scalars: ops.StepScalars):
        self.buckets, self.norm, self.scalars = buckets, norm, scalars
        self.stepped = [torch.zeros(len(bucket.params), dtype=torch.bool) for bucket in buckets]
        self.adjoint_inf = torch.zeros_like(norm.found_inf)
        self.listening = self.armed = False
        self._handles = [
            param.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket, stepped, index))
            for bucket, stepped in zip(buckets, self.stepped)
            for index, param in enumerate(bucket.params)
        ]

    @property
    def begun(self) -> bool:
        """Whether any parameter has been stepped in this pass."""
        return any(bool(stepped.any()) for stepped in self.stepped)

    def listen(self) -> None:
        """Treat gradients from now on as those of the second pass."""
        self.forget()
        self.adjoint_inf.zero_()
        self.listening, self.armed = True, False

    def check_finite(self, tensors: tuple[torch.Tensor, ...]) -> None:
        if not self.listening or self.armed:
            raise RuntimeError("check_finite() belongs between perturb() and the second backward")
        flags = [(~torch.isfinite(tensor)).any() for tensor in tensors]
        self.adjoint_inf.copy_(torch.maximum(self.adjoint_inf, torch.stack(flags).any().float()))

    def arm(self) -> None:
        """Decide once what all tensors share, before the first of them is touched."""
        if not self.armed:
            self.armed = True
            inputs = ops.StepInputs(self.scalars, self.norm, found_inf=self.adjoint_inf, released=True)
            ops.adamw_coefficients_([bucket.table for bucket in self.buckets], self.norm, inputs)

    @torch.no_grad()
    def _arrived(self, bucket: Bucket, stepped: torch.Tensor, index: int, param: torch.Tensor) -> None:
        if not self.listening:
            return
        if not bucket.table.suits(index, param) or not bucket.table.holds("weight", index, param):
            raise RuntimeError(
                f"parameter {index} of shape {tuple(param.shape)} moved between perturb() and its gradient, which "
                "release_gradients=True would apply where it was: move the model before perturb() or after step()"
            )
        if stepped[index]:
            raise RuntimeError(
                f"parameter {index} of shape {tuple(param.shape)} got a second gradient in pass 2, and the first has "
                "been applied: release_gradients=True needs exactly one backward there (no accumulation)"
            )
        self.arm()
        gradient: Any = in_layout_of(param, param.grad)  # it has just arrived
        bucket.step_tensor(index, gradient, self.scalars, self.norm)
        stepped[index] = True
        param.grad = None
        bucket.drop_backup(index)

    def restore_rest(self) -> None:
        """Restore the parameters that no gradient reached to their unperturbed weights."""
        self.listening = False
        left = [(~stepped).nonzero().flatten().tolist() for stepped in self.stepped]
        try:
            for bucket, indices in zip(self.buckets, left):
                if indices:
                    bucket.table.bind(weight=bucket.weights)
        except WeightsChangedError:
            for bucket, indices in zip(self.buckets, left):
                bucket.restore_changed(self.norm, indices)
            return
        for bucket, indices in zip(self.buckets, left):
            if len(indices) == len(bucket.params):
                bucket.restore(self.norm)
                continue
            for index in indices:
                bucket.restore(self.norm, index)

    def count(self) -> None:
        """Count the step of every parameter that took one, and the skip if it was one."""
        self.arm()
        for bucket, stepped in zip(self.buckets, self.stepped):
            steps = bucket.table.steps
            taken = 1.0 if stepped.all() else to_device(stepped.to(steps.dtype), steps.device)
            steps.add_(taken * (self.scalars.skip == 0))
        self.forget()

    def forget(self) -> None:
        """Forget the parameters stepped so far."""
        for stepped in self.stepped:
            stepped.zero_()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
