"""Scalars that one kernel leaves on the device for the next one; the host reads none of them during a step."""

from dataclasses import dataclass

import torch

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
"""Columns of `StepScalars.hyper`."""

COEFFICIENTS = (
    "gradient_factor",  # clip coefficient / gradient scale
    "decay",  # 1 - lr * weight_decay
    "beta1_complement",  # 1 - beta1
    "beta2",
    "beta2_complement",  # 1 - beta2
    "bias2_sqrt",  # sqrt(1 - beta2^step)
    "eps",
    "step_size",  # lr / (1 - beta1^step)
    "step",  # the step being made, from 1: what stochastic rounding draws by
)
"""Columns of `TensorTable.coefficients`: what the AdamW kernel needs of each tensor, written just before it runs."""


class GradientNorm:
    """Gradient norm on the device: the result of `global_norm`.

    Attributes:
        values: float64 `(2 + groups,)`; the next three are its views.
        sum_sq: float64 scalar, the squared norm. norm: float64 scalar.
        scale: float64 `(groups,)`: `rho / (norm + 1e-12)`; 0 for a zero or a non-finite gradient.
        found_inf: float32 scalar, 1 where the norm is not finite (torch's `found_inf` convention), else 0.
    """

    def __init__(self, device: torch.device | str, groups: int = 1):
        self.values = torch.zeros(2 + groups, dtype=torch.float64, device=device)
        self.sum_sq, self.norm, self.scale = self.values[0], self.values[1], self.values[2:]
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)


class StepScalars:
    """Hyper-parameters, skip flag and skip counter of `sam_adamw_step_`, on the device.

    Attributes:
        hyper: float64 `(groups, 6)`, columns `HYPER`; `max_grad_norm` is inf where there is no clipping.
        skip: float32 scalar, 1 where the last step was skipped. skipped: int64 scalar, how many were.
    """

    def __init__(self, device: torch.device | str, groups: int = 1):
        self.hyper = torch.zeros(groups, len(HYPER), dtype=torch.float64, device=device)
        self.skip = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)


@dataclass
class StepInputs:
    """Inputs of AdamW's coefficients, besides a norm.

    Attributes:
        scalars: hyper-parameters, one row a group; receives the skip flag and counter.
        first: the norm that the perturbation used, if there was one: a non-finite one skips the step.
        grad_scale: float32 scalar by which the gradients are too large (GradScaler). found_inf: its flag.
        released: the step runs tensor by tensor while the gradients arrive. Coefficients are then those of each
            tensor's next step, and `TensorTable.steps` stays: the caller adds to it for those that got a gradient.
    """

    scalars: StepScalars
    first: GradientNorm | None = None
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    released: bool = False
