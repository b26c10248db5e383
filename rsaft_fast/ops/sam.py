"""Table operations: global norm, perturbation, restore, and restore + AdamW, on the backend that fits the table.

Every operation writes through raw addresses, returns nothing to the host, bumps the version counters of what it wrote
and is kept out of traced graphs.
"""

from collections.abc import Sequence

import torch
import torch.distributed

from rsaft_fast.abi.scalars import GradientNorm, StepInputs, StepScalars
from rsaft_fast.abi.table import TensorTable
from rsaft_fast.ops import backends, reference
from rsaft_fast.ops.eager import eager_only


def _implementation(table: TensorTable):
    return backends.implementation(table.device, table.float_dtypes)


def _common(tables: Sequence[TensorTable]):
    """Choose the backend that takes all of these tables in one call; plain torch where one needs it (float64)."""
    found = [_implementation(table) for table in tables]
    return reference if reference in found else found[0]


def _written(weights: Sequence[torch.Tensor]) -> None:
    """Let autograd notice the write; of state and backups it keeps none."""
    torch.autograd.graph.increment_version(weights)


@eager_only
def global_norm(
    tables: TensorTable | Sequence[TensorTable],
    rho: float | torch.Tensor = 0.0,
    *,
    plain: bool = False,
    out: GradientNorm | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    inputs: StepInputs | None = None,
) -> GradientNorm:
    """Compute the L2 norm over all gradients of all tables, and the perturbation's scale (arXiv 2010.01412, eq. 2).

    Squares are summed in float32 within a chunk (float64 on the torch path for float64), the chunks in float64 and in
    fixed order: the same bits on every run. Float32 squares overflow above 1.8e19 (counted as non-finite) and vanish
    below 1e-23 on GPU kernels; on CPUs, and in plain torch, they are summed in float64 throughout.

    Args:
        tables: with `grad` bound. Absent gradients count as zero. A table with `adaptive` sums `(w * g)**2`,
            unless `plain`: clipping is about the gradient itself.
        rho: the radius, one for all, or a float64 tensor on the device with one a group.
        out: where to write; new by default.
        process_group: squared norms are summed over its ranks (for parameters sharded over them). None: this rank's.
        inputs: prepare `sam_adamw_step_` from this norm too, as `adamw_coefficients_` does, without a launch of its
            own.
    """
    tables = [tables] if isinstance(tables, TensorTable) else list(tables)
    if not tables:
        raise ValueError("a norm of no table: give it at least one")
    device = tables[0].device
    if any(table.device != device for table in tables):
        raise ValueError(f"tables on {', '.join(sorted({str(t.device) for t in tables}))}: one device a norm")
    if not isinstance(rho, torch.Tensor):
        rho = torch.full((1 if out is None else out.scale.numel(),), float(rho), dtype=torch.float64, device=device)
    out = GradientNorm(device, rho.numel()) if out is None else out
    if rho.dtype != torch.float64 or rho.device != device or rho.numel() != out.scale.numel():
        raise ValueError(
            f"rho is {rho.dtype} of {rho.numel()} on {rho.device}: it must be float64, one for each of the norm's "
            f"{out.scale.numel()} groups, on {device}"
        )
    for table in tables:
        _check(table, out, "grad")
        _implementation(table).sum_of_squares(table, table.adaptive and not plain)
    slots = [table.sum_sq for table in tables]
    backend = _common(tables)
    if process_group is None and inputs is not None:
        backend.finish_norm(slots, out, rho, tables, inputs)
        return out
    backend.finish_norm(slots, out, rho)
    if process_group is not None:
        torch.distributed.all_reduce(out.sum_sq, group=process_group)
        reference.scale_from_sum(out, rho)
        if inputs is not None:
            adamw_coefficients_(tables, out, inputs)
    return out


@eager_only
def sam_perturb_(table: TensorTable, norm: GradientNorm) -> None:
    """Add `scale * g` (`scale * w**2 * g` for an adaptive table) to the weights, unless `norm.found_inf` is set.

    With a `master` list, weights become `round(master + e)`; otherwise the `backup` list receives the old bits.
    It may be the gradients' own memory (same dtype as the weights): each element is read before it is written. An
    absent backup needs an absent gradient. `table.perturbation_sums` receives what was applied at the weight's
    precision, against what was wanted.
    """
    if "master" not in table and "backup" not in table:
        raise ValueError("sam_perturb_ needs a master or a backup list to restore from: table.bind(backup=...)")
    _check(table, norm, "grad")
    _check_rounding(table)
    _implementation(table).sam_perturb_(table, norm)
    _written(table["weight"])


@eager_only
def sam_restore_(table: TensorTable, norm: GradientNorm, tensor: int | None = None) -> None:
    """Undo `sam_perturb_` bit for bit; of all tensors, or of the one with this index.

    `norm` is the one that perturb used: after its no-op nothing is written, nor where a backup is absent.
    """
    if "master" not in table and "backup" not in table:
        raise ValueError("sam_restore_ needs the master or backup list that sam_perturb_ had: table.bind(backup=...)")
    _check(table, norm)
    _implementation(table).sam_restore_(table, norm, tensor)
    _written(table["weight"] if tensor is None else [table["weight"][tensor]])


@eager_only
def adamw_coefficients_(tables: TensorTable | Sequence[TensorTable], norm: GradientNorm, inputs: StepInputs) -> None:
    """Prepare `sam_adamw_step_`: the skip flag, step counts, and what its kernel needs of each tensor.

    The step is skipped as a whole, restore excepted, when `norm`, `inputs.first` or `inputs.found_inf` reports a
    non-finite value; then `scalars.skipped` grows by one and no step count does.

    Args:
        tables: all tables of the step. norm: of the gradients as they are in memory; clipping follows it.
    """
    tables = [tables] if isinstance(tables, TensorTable) else list(tables)
    _common(tables).adamw_coefficients(tables, norm, inputs)


@eager_only
def sam_adamw_step_(
    tables: TensorTable | Sequence[TensorTable],
    scalars: StepScalars,
    *,
    first: GradientNorm | None = None,
    restore: bool = False,
) -> None:
    """Restore, unscale, clip and make AdamW's step (arXiv 1711.05101) in one pass over the weights.

    Prepared by `global_norm(..., inputs=...)` or `adamw_coefficients_`. A tensor without a gradient is restored,
    not updated; where the step is skipped, all are. 8-bit moments (uint8 `exp_avg`, `exp_avg_sq` and their
    `ABSMAX` lists) are decoded, updated in float32 and rounded to the nearest code of their block (`quantize`).

    Args:
        tables: with `grad`, `exp_avg`, `exp_avg_sq` bound, and what restoring needs.
        first: the norm that the perturbation used, if there was one. restore: whether the weights are perturbed.
    """
    for table in [tables] if isinstance(tables, TensorTable) else list(tables):
        _check(table, first, "grad", "exp_avg", "exp_avg_sq")
        _check_rounding(table)
        _implementation(table).sam_adamw_step_(table, scalars, first, restore)
        _written(table["weight"])


@eager_only
def sam_adamw_step_tensor_(
    table: TensorTable,
    tensor: int,
    grad: torch.Tensor,
    scalars: StepScalars,
    *,
    first: GradientNorm,
    restore: bool = True,
) -> None:
    """Make `sam_adamw_step_` of one tensor of the table, from a gradient that the table does not know.

    Raises:
        ValueError, TypeError: the gradient does not fit its weight. Nothing has been written then.
    """
    table.check("grad", tensor, grad)
    _implementation(table).sam_adamw_step_(table, scalars, first, restore, tensor, grad)
    _written([table["weight"][tensor]])


def _check(table: TensorTable, norm: GradientNorm | None, *lists: str) -> None:
    """Check what a kernel reads without looking: the lists, by address, and a row of the norm for each group."""
    for name in lists:
        table[name]  # or a KeyError that says what to bind
    if norm is not None and (norm.scale.numel() < table.groups or norm.scale.device != table.device):
        raise ValueError(
            f"a norm of {norm.scale.numel()} groups on {norm.scale.device} for a table of {table.groups} on "
            f"{table.device}: GradientNorm(table.device, groups)"
        )


def _check_rounding(table: TensorTable) -> None:
    if table.rounding_seed is not None and table.dtypes["weight"] != torch.bfloat16:
        raise TypeError(f"stochastic rounding is for bfloat16 weights, not {table.dtypes['weight']}")
