"""Backend in plain torch: the oracle for the kernels, and what runs on CPUs and in float64.

Arithmetic is float32 for low-precision tensors and float64 for float64 ones. No value returns to the host, so these
functions run under `torch.cuda.set_sync_debug_mode("error")` too. Tensors are walked flat, in memory order.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from rsaft_fast.abi.philox import PERTURBATION, UPDATE, random16, round_stochastically
from rsaft_fast.abi.quantize import BLOCK, dequantize_blocks, quantize_blocks
from rsaft_fast.abi.scalars import GradientNorm, StepInputs, StepScalars
from rsaft_fast.abi.table import ABSMAX, CHUNK, LISTS, ROW, TensorTable

PIECE = 8 * CHUNK
"""Elements worked on at once on the CPU: a MB of float32, so that one operation finds in a cache what another wrote."""


def _compute_dtype(table: TensorTable) -> torch.dtype:
    return torch.promote_types(table.dtypes["weight"], torch.float32)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """View all elements in memory order: layouts are dense, so nothing lies between them."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _rows(table: TensorTable, tensor: int | None = None) -> Iterator[SimpleNamespace]:
    """Give each tensor's lists by name, flat and None where absent, with its index; those with elements only.

    On the CPU a tensor comes in pieces: `start` is where in the tensor one begins, `slot` its first chunk.
    """
    for index in range(len(table)) if tensor is None else (tensor,):
        numel = table.shapes[index].numel()
        lists = {name: table[name][index] if name in table else None for name in LISTS}
        lists = {name: None if held is None else _flat(held) for name, held in lists.items()}
        size = PIECE if table.device.type == "cpu" else max(numel, 1)
        for start in range(0, numel, size):
            piece = lists if size >= numel else {name: _cut(name, x, start, size) for name, x in lists.items()}
            slot = table.first_chunk[index] + start // CHUNK
            yield SimpleNamespace(index=index, start=start, slot=slot, **piece)


def _cut(name: str, flat: torch.Tensor | None, start: int, size: int) -> torch.Tensor | None:
    if flat is None:
        return None
    each = BLOCK if name in ABSMAX else 1
    return flat[start // each : (start + size) // each]


def _round(table: TensorTable, row: SimpleNamespace, x: torch.Tensor, step: torch.Tensor, purpose: int) -> torch.Tensor:
    """Round to the weight's dtype."""
    if table.rounding_seed is None or "master" in table:
        return x.to(table.dtypes["weight"])
    bits = random16(x.numel(), table.rounding_seed, step, table.parameters[row.index], purpose, row.start)
    return round_stochastically(x, bits)


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    """Fill `table.sum_sq`: each piece's sum in the slot of its first chunk (the kernels use every chunk's slot)."""
    table.sum_sq.zero_()
    for row in _rows(table):
        if row.grad is None:
            continue
        grad = row.weight.to(_compute_dtype(table)) * row.grad if adaptive else row.grad
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        table.sum_sq[row.slot] = norm * norm


def finish_norm(
    slots: list[torch.Tensor],
    norm: GradientNorm,
    rho: torch.Tensor,
    tables: list[TensorTable] | None = None,
    inputs: StepInputs | None = None,
) -> None:
    """Add all slots up in float64 to norm, scale and found_inf; `rho`: float64, as many as `norm.scale`.

    With `tables` and `inputs`: their AdamW coefficients too.
    """
    norm.sum_sq.copy_(torch.cat(slots).sum())
    scale_from_sum(norm, rho)
    if inputs is not None:
        adamw_coefficients(tables or [], norm, inputs)


def scale_from_sum(norm: GradientNorm, rho: torch.Tensor) -> None:
    """Compute norm, scale and found_inf from `norm.sum_sq`."""
    norm.norm.copy_(norm.sum_sq.sqrt())
    norm.found_inf.copy_(~torch.isfinite(norm.norm))
    usable = torch.isfinite(norm.norm) & (norm.norm > 0)
    norm.scale.copy_(torch.where(usable, rho / (norm.norm + 1e-12), 0.0))


def sam_perturb_(table: TensorTable, norm: GradientNorm) -> None:
    """Perturb the weights of a table by `norm.scale`; do nothing where `norm.found_inf` is set."""
    dtype = _compute_dtype(table)
    finite = norm.found_inf == 0
    scale = norm.scale[table.group.long()].to(dtype)
    table.perturbation_sums.zero_()
    for row in _rows(table):
        if row.master is None and row.backup is None:
            continue  # nothing could bring it back
        if row.grad is None:
            if row.backup is not None:
                row.backup.copy_(torch.where(finite, row.weight, row.backup))
            continue
        old, base = row.weight.clone(), row.weight.to(dtype) if row.master is None else row.master
        wanted = scale[row.index] * row.grad.to(dtype)
        if table.adaptive:
            wanted = wanted * (base * base)
        perturbed = _round(table, row, base + wanted, table.steps[row.index], PERTURBATION)
        row.weight.copy_(torch.where(finite, perturbed, old))
        # Last: the backup may be the gradient's own memory.
        if row.backup is not None:
            row.backup.copy_(torch.where(finite, old, row.backup))
        wanted = torch.where(finite, wanted, 0.0)
        applied = row.weight.to(dtype) - old.to(dtype)
        table.perturbation_sums[row.slot] = torch.stack(
            [(a * b).sum(dtype=torch.float64) for a, b in ((applied, applied), (applied, wanted), (wanted, wanted))]
        )


def _unperturbed(row: SimpleNamespace, intact: torch.Tensor) -> torch.Tensor:
    """Give the weight's old bits.

    Without a source it was never perturbed; nor was it where perturbing was a no-op.
    """
    source = row.backup if row.master is None else row.master.to(row.weight.dtype)
    return row.weight if source is None else torch.where(intact, source, row.weight)


def sam_restore_(table: TensorTable, norm: GradientNorm, tensor: int | None = None) -> None:
    """Restore the weights of a table, or of its one `tensor`."""
    for row in _rows(table, tensor):
        row.weight.copy_(_unperturbed(row, norm.found_inf == 0))


def adamw_coefficients(tables: list[TensorTable], norm: GradientNorm, inputs: StepInputs) -> None:
    """Write the skip flag and counter, each tensor's step count, and `TensorTable.coefficients`."""
    scalars = inputs.scalars
    skip = norm.found_inf
    for flag in (None if inputs.first is None else inputs.first.found_inf, inputs.found_inf):
        skip = skip if flag is None else torch.maximum(skip, flag.to(skip))
    scalars.skip.copy_(skip)
    scalars.skipped.add_((skip != 0).long())
    for table in tables:
        _coefficients(table, norm, inputs)


def _coefficients(table: TensorTable, norm: GradientNorm, inputs: StepInputs) -> None:
    lr, beta1, beta2, eps, weight_decay, max_norm = inputs.scalars.hyper[table.group.long()].unbind(1)
    present = (table.addresses[ROW["grad"]] != 0) | inputs.released
    step = (table.steps + (present & (inputs.scalars.skip == 0))).double()
    if not inputs.released:
        table.steps.copy_(step)
    factor = torch.ones_like(norm.norm) if inputs.grad_scale is None else 1 / inputs.grad_scale.double()
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
        step,
    )
    table.coefficients.copy_(torch.stack(columns, dim=1))


def sam_adamw_step_(
    table: TensorTable,
    scalars: StepScalars,
    first: GradientNorm | None,
    restore: bool,
    tensor: int | None = None,
    grad: torch.Tensor | None = None,
) -> None:
    """Restore and update the weights of a table, or of its one `tensor` from `grad`."""
    update = scalars.skip == 0
    intact = torch.ones_like(update) if first is None else first.found_inf == 0
    coefficients = table.coefficients.to(_compute_dtype(table))
    for row in _rows(table, tensor):
        if grad is not None:
            row.grad = _flat(grad)[row.start : row.start + row.weight.numel()]
        kept = _unperturbed(row, intact) if restore else row.weight
        if row.grad is None:
            row.weight.copy_(kept)
        else:
            _step_row(table, row, kept, coefficients[row.index], update)


def _step_row(table: TensorTable, row: SimpleNamespace, kept, coefficients: torch.Tensor, update: torch.Tensor) -> None:
    factor, decay, beta1_c, beta2, beta2_c, bias2_sqrt, eps, step_size, step = coefficients.unbind()
    grad = row.grad.to(coefficients.dtype) * factor
    base = kept.to(coefficients.dtype) if row.master is None else row.master
    m, v = _moments(row)
    m = m + (grad - m) * beta1_c
    v = v * beta2 + (grad * grad) * beta2_c
    new = base * decay - step_size * (m / (v.sqrt() / bias2_sqrt + eps))
    row.weight.copy_(torch.where(update, _round(table, row, new, step, UPDATE), kept))
    if row.master is not None:
        row.master.copy_(torch.where(update, new, row.master))
    for target, value in _stored(row, m, v):
        target.copy_(torch.where(update, value, target))


def _moments(row: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    if row.exp_avg_absmax is None:
        return row.exp_avg, row.exp_avg_sq
    return (
        dequantize_blocks(row.exp_avg, row.exp_avg_absmax, signed=True),
        dequantize_blocks(row.exp_avg_sq, row.exp_avg_sq_absmax, signed=False),
    )


def _stored(row: SimpleNamespace, m: torch.Tensor, v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if row.exp_avg_absmax is None:
        return [(row.exp_avg, m), (row.exp_avg_sq, v)]
    (m, m_max), (v, v_max) = quantize_blocks(m, signed=True), quantize_blocks(v, signed=False)
    return [(row.exp_avg, m), (row.exp_avg_absmax, m_max), (row.exp_avg_sq, v), (row.exp_avg_sq_absmax, v_max)]


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
    """Write `out = images + delta`, or `out = delta` without images; see `image_delta`."""
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


def bf16_parts(wide: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """See `ops.bf16_parts`."""
    high = _nearest_bf16(wide)
    rest = wide - high
    middle = _nearest_bf16(rest)
    parts = (high, middle, rest - middle)
    return torch.cat([parts[index] for index in order]).to(torch.bfloat16)


def _nearest_bf16(x: torch.Tensor) -> torch.Tensor:
    """The nearest bf16 number, in fp32. By its bits: a compiler may leave out a cast to bf16 and back."""
    return ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
