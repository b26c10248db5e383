"""The table operations: global norm, perturbation, restore, and restore + AdamW, on the backend that fits the table.

Every operation writes through raw addresses, returns nothing to the host, bumps the version counters of what it wrote
and is kept out of traced graphs.
"""

from collections.abc import Sequence

import torch
import torch.distributed

from . import backends, reference
from .eager import eager_only
from .scalars import GradientNorm, StepScalars
from .table import TensorTable


def _implementation(table: TensorTable):
    return backends.implementation(table.device, tuple(table.dtypes.values()))


def _written(table: TensorTable, *names: str) -> None:
    tensors = [tensor for name in names if name in table for tensor in table[name] if tensor is not None]
    torch.autograd.graph.increment_version(tensors)


@eager_only
@torch.no_grad()
def global_norm(
    tables: TensorTable | Sequence[TensorTable],
    rho: float | torch.Tensor = 0.0,
    *,
    plain: bool = False,
    out: GradientNorm | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> GradientNorm:
    """L2 norm over all gradients of all tables, and the perturbation's scale (SAM, arXiv 2010.01412, eq. 2).

    Squares are summed in float32 within a chunk (float64 on the torch path for float64), the chunks in float64 and in
    fixed order: the same bits on every run. Float32 squares overflow above 1.8e19 (counted as non-finite) and vanish
    below 1e-23 on the kernels; the torch path sums in float64 throughout.

    Args:
        tables: with ``grad`` bound. Absent gradients count as zero. A table with ``adaptive`` sums ``(w * g)**2``,
            unless ``plain``: clipping is about the gradient itself.
        rho: the radius, one for all, or a float64 tensor on the device with one a group.
        out: where to write; new by default.
        process_group: squared norms are summed over its ranks (for parameters sharded over them). None: this rank's.
    """
    tables = [tables] if isinstance(tables, TensorTable) else list(tables)
    device = tables[0].device
    if any(table.device != device for table in tables):
        raise ValueError(f"tables on {', '.join(sorted({str(t.device) for t in tables}))}: one device a norm")
    if not isinstance(rho, torch.Tensor):
        rho = torch.full((1 if out is None else out.scale.numel(),), float(rho), dtype=torch.float64, device=device)
    out = GradientNorm(device, rho.numel()) if out is None else out
    for table in tables:
        _implementation(table).sum_of_squares(table, table.adaptive and not plain)
    backends.implementation(device).finish_norm([table.sum_sq for table in tables], out, rho)
    if process_group is not None:
        torch.distributed.all_reduce(out.sum_sq, group=process_group)
        reference.scale_from_sum(out, rho)
    return out


@eager_only
@torch.no_grad()
def sam_perturb_(table: TensorTable, norm: GradientNorm) -> None:
    """``w += scale * g`` (``scale * w**2 * g`` for an adaptive table), where ``norm.found_inf`` is 0; else nothing.

    With a ``master`` list, weights become ``round(master + e)``; otherwise the ``backup`` list receives the old bits.
    ``table.perturbation_sums`` receives what was applied at the weight's precision, against what was wanted.
    """
    if "master" not in table and "backup" not in table:
        raise ValueError("sam_perturb_ needs a master or a backup list to restore from: table.bind(backup=...)")
    _implementation(table).sam_perturb_(table, norm)
    _written(table, "weight", "backup")


@eager_only
@torch.no_grad()
def sam_restore_(table: TensorTable, norm: GradientNorm) -> None:
    """Undo ``sam_perturb_`` bit for bit. ``norm`` is the one that perturb used: after its no-op nothing is written."""
    _implementation(table).sam_restore_(table, norm)
    _written(table, "weight")


@eager_only
@torch.no_grad()
def sam_adamw_step_(
    tables: TensorTable | Sequence[TensorTable],
    norm: GradientNorm,
    scalars: StepScalars,
    *,
    first: GradientNorm | None = None,
    restore: bool = False,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Restore, unscale, clip and AdamW (arXiv 1711.05101) in one pass over the weights.

    Skipped as a whole, restore excepted, when ``norm``, ``first`` or ``found_inf`` reports a non-finite value; then
    ``scalars.skipped`` grows by one and no step count does. A tensor without a gradient is restored, not updated.

    Args:
        tables: with ``grad``, ``exp_avg``, ``exp_avg_sq`` bound, and what restoring needs.
        norm: of the gradients as they are in memory. scalars: hyper-parameters, one row a group.
        first: the norm that the perturbation used, if there was one.
        restore: whether the weights are still perturbed.
        grad_scale: float32 scalar by which the gradients are too large (GradScaler). found_inf: its flag.
    """
    tables = [tables] if isinstance(tables, TensorTable) else list(tables)
    for index, table in enumerate(tables):
        implementation = _implementation(table)
        implementation.adamw_coefficients(table, norm, scalars, first, grad_scale, found_inf, count=index == 0)
        implementation.sam_adamw_step_(table, scalars, first, restore)
        _written(table, "weight", "master", "exp_avg", "exp_avg_sq")
