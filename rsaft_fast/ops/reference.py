"""The operations in plain torch: the oracle for the kernels, and what runs on CPUs and in float64.

Arithmetic is float32 for low-precision tensors and float64 for float64 ones. No value returns to the host, so these
functions run under ``torch.cuda.set_sync_debug_mode("error")`` too.
"""

import torch

from .scalars import GradientNorm, StepScalars
from .table import ROW, TensorTable


def _compute_dtype(table: TensorTable) -> torch.dtype:
    return torch.promote_types(table.dtypes["weight"], torch.float32)


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    """Fills ``table.sum_sq``: each tensor's sum in the slot of its first chunk (the kernels use every chunk's slot)."""
    table.sum_sq.zero_()
    for index, (weight, grad) in enumerate(zip(table["weight"], table["grad"])):
        if grad is None or grad.numel() == 0:
            continue
        if adaptive:
            grad = weight.to(_compute_dtype(table)) * grad
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        table.sum_sq[table.first_chunk[index]] = norm * norm


def finish_norm(slots: list[torch.Tensor], norm: GradientNorm, rho: torch.Tensor) -> None:
    """The sum of all slots in float64, and what follows from it. ``rho``: float64, as many as ``norm.scale``."""
    norm.sum_sq.copy_(torch.cat(slots).sum())
    scale_from_sum(norm, rho)


def scale_from_sum(norm: GradientNorm, rho: torch.Tensor) -> None:
    """``norm.sum_sq`` to norm, scale and found_inf."""
    norm.norm.copy_(norm.sum_sq.sqrt())
    norm.found_inf.copy_(~torch.isfinite(norm.norm))
    usable = torch.isfinite(norm.norm) & (norm.norm > 0)
    norm.scale.copy_(torch.where(usable, rho / (norm.norm + 1e-12), 0.0))


def sam_perturb_(table: TensorTable, norm: GradientNorm) -> None:
    dtype = _compute_dtype(table)
    finite = norm.found_inf == 0
    scale = norm.scale[table.group.long()].to(dtype)
    backups = table["backup"] if "backup" in table else [None] * len(table)
    masters = table["master"] if "master" in table else [None] * len(table)
    table.perturbation_sums.zero_()
    for index, (weight, grad, backup, master) in enumerate(zip(table["weight"], table["grad"], backups, masters)):
        if backup is not None:
            backup.copy_(weight)
        if grad is None or weight.numel() == 0:
            continue
        base = weight.to(dtype) if master is None else master
        wanted = scale[index] * grad.to(dtype)
        if table.adaptive:
            wanted = wanted * (base * base)
        perturbed = torch.where(finite, (base + wanted).to(weight.dtype), weight)
        wanted = torch.where(finite, wanted, 0.0)
        applied = perturbed.to(dtype) - weight.to(dtype)
        table.perturbation_sums[table.first_chunk[index]] = torch.stack(
            [(a * b).sum(dtype=torch.float64) for a, b in ((applied, applied), (applied, wanted), (wanted, wanted))]
        )
        weight.copy_(perturbed)


def sam_restore_(table: TensorTable, norm: GradientNorm) -> None:
    finite = norm.found_inf == 0
    for weight, source in zip(table["weight"], table["master"] if "master" in table else table["backup"]):
        weight.copy_(torch.where(finite, source.to(weight.dtype), weight))


def adamw_coefficients(
    table: TensorTable,
    norm: GradientNorm,
    scalars: StepScalars,
    first: GradientNorm | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    count: bool,
) -> None:
    """The skip flag and counter, each tensor's step count, and ``table.coefficients`` (columns ``COEFFICIENTS``)."""
    skip = norm.found_inf
    for flag in (None if first is None else first.found_inf, found_inf):
        skip = skip if flag is None else torch.maximum(skip, flag.to(skip))
    scalars.skip.copy_(skip)
    if count:
        scalars.skipped.add_((skip != 0).long())

    lr, beta1, beta2, eps, weight_decay, max_norm = scalars.hyper[table.group.long()].unbind(1)
    present = table.addresses[ROW["grad"]] != 0
    table.steps.add_(present & (skip == 0))
    step = table.steps.double()
    factor = torch.ones_like(norm.norm) if grad_scale is None else 1 / grad_scale.double()
    clip = (max_norm / (norm.norm * factor + 1e-6)).clamp(max=1.0)
    columns = (
        clip * factor,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step).sqrt(),
        eps,
        lr / (1 - beta1**step),
    )
    table.coefficients.copy_(torch.stack(columns, dim=1))


def sam_adamw_step_(table: TensorTable, scalars: StepScalars, first: GradientNorm | None, restore: bool) -> None:
    dtype = _compute_dtype(table)
    update = scalars.skip == 0
    intact = torch.ones_like(update) if first is None else first.found_inf == 0
    coefficients = table.coefficients.to(dtype)
    masters = table["master"] if "master" in table else [None] * len(table)
    backups = table["backup"] if restore and "master" not in table else [None] * len(table)
    rows = zip(table["weight"], table["grad"], masters, backups, table["exp_avg"], table["exp_avg_sq"], coefficients)
    for weight, grad, master, backup, exp_avg, exp_avg_sq, row in rows:
        factor, decay, beta1_c, beta2, beta2_c, bias2_sqrt, eps, step_size = row.unbind()
        kept = weight if backup is None else torch.where(intact, backup, weight)
        if master is not None and restore:
            kept = torch.where(intact, master.to(weight.dtype), weight)
        if grad is None:
            weight.copy_(kept)
            continue
        grad = grad.to(dtype) * factor
        base = kept.to(dtype) if master is None else master
        m = exp_avg + (grad - exp_avg) * beta1_c
        v = exp_avg_sq * beta2 + (grad * grad) * beta2_c
        new = base * decay - step_size * (m / (v.sqrt() / bias2_sqrt + eps))
        weight.copy_(torch.where(update, new.to(weight.dtype), kept))
        if master is not None:
            master.copy_(torch.where(update, new, master))
        exp_avg.copy_(torch.where(update, m, exp_avg))
        exp_avg_sq.copy_(torch.where(update, v, exp_avg_sq))


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
    """``out = images + delta``, or ``out = delta`` without images; see ``image_delta``."""
    axes = tuple(range(1, grad.dim()))
    length = torch.linalg.vector_norm(grad, dim=axes, dtype=torch.float64) if axes else grad.double().abs()
    length = length.view([len(grad)] + [1] * len(axes))
    usable = torch.isfinite(length) & (length > 0)
    compute = torch.promote_types(torch.promote_types(out.dtype, grad.dtype), torch.float32)
    # Unusable samples are emptied before the product, which would turn 0 * inf into NaN.
    grad = torch.where(usable, grad, 0.0).to(compute)
    if norm == "linf":
        delta = grad.sign() * -radius
    else:
        elements = grad[0].numel() if norm == "rms" and len(grad) else 1
        delta = grad * torch.where(usable, -radius * elements**0.5 / length, 0.0).to(compute)
    out.copy_(delta if images is None else images.to(compute) + delta)
