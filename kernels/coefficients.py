"""AdamW coefficients: a few numbers a tensor from hyper-parameters, step counts and the norms of both passes.

Usually the launch that finishes the second norm does this too (`global_norm`); alone it is one small launch.
"""

import triton
import triton.language as tl

from rsaft_fast.abi.scalars import COEFFICIENTS, HYPER
from rsaft_fast.abi.table import ROW, TensorTable
from rsaft_fast.kernels.common import OPTIONS, launcher, on, unspecialised

TENSORS_BLOCK = 512


@triton.jit
def skip_flag(norm_inf, first_inf, scaler_inf):
    """Combine the optional overflow flags with the norm's: 1.0 skips the step."""
    if first_inf is not None:
        norm_inf = tl.maximum(norm_inf, tl.load(first_inf))
    if scaler_inf is not None:
        norm_inf = tl.maximum(norm_inf, tl.load(scaler_inf))
    return norm_inf


@triton.jit
def note_skip(skip, skip_out, skipped):
    """Store the skip flag and add it to the counter of skipped steps."""
    tl.store(skip_out, skip)
    tl.store(skipped, tl.load(skipped) + tl.where(skip != 0, 1, 0))


@triton.jit
def unscaling(grad_scale):
    """Compute the factor that undoes the gradient scaling, in float64."""
    factor = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    return factor


@triton.jit
def write_coefficients(
    addresses,
    group,
    steps,
    coefficients,
    hyper,
    tensors,
    first_tensor,
    norm,
    skip,
    factor,
    ROW_GRAD: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    RELEASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the coefficients of BLOCK tensors.

    `norm`: of the gradients before `factor`. RELEASED: coefficients of the tensors' next steps, which are not counted.
    """
    i_tensor = first_tensor + tl.arange(0, BLOCK)
    m_tensor = i_tensor < tensors
    b_step = tl.load(steps + i_tensor, mask=m_tensor, other=0.0)
    advance = tl.where(skip == 0, 1.0, 0.0)
    if RELEASED:
        b_step += advance
    else:
        present = tl.load(addresses + ROW_GRAD * tensors + i_tensor, mask=m_tensor, other=0) != 0
        b_step += tl.where(present, advance, 0.0)
        tl.store(steps + i_tensor, b_step, mask=m_tensor)
    b_step = b_step.to(tl.float64)

    p_hyper = hyper + N_HYPER * tl.load(group + i_tensor, mask=m_tensor, other=0)
    b_lr = tl.load(p_hyper)
    b_beta1 = tl.load(p_hyper + 1)
    b_beta2 = tl.load(p_hyper + 2)
    b_clip = tl.minimum(tl.load(p_hyper + 5) / (norm * factor + 1e-6), 1.0)
    b_bias1 = 1.0 - tl.exp(b_step * tl.log(b_beta1))
    b_bias2 = 1.0 - tl.exp(b_step * tl.log(b_beta2))
    p_out = coefficients + N_COEFFICIENTS * i_tensor
    tl.store(p_out, b_clip * factor, mask=m_tensor)
    tl.store(p_out + 1, 1.0 - b_lr * tl.load(p_hyper + 4), mask=m_tensor)
    tl.store(p_out + 2, 1.0 - b_beta1, mask=m_tensor)
    tl.store(p_out + 3, b_beta2, mask=m_tensor)
    tl.store(p_out + 4, 1.0 - b_beta2, mask=m_tensor)
    tl.store(p_out + 5, tl.sqrt(b_bias2), mask=m_tensor)
    tl.store(p_out + 6, tl.load(p_hyper + 3), mask=m_tensor)
    tl.store(p_out + 7, b_lr / b_bias1, mask=m_tensor)
    tl.store(p_out + 8, b_step, mask=m_tensor)


@unspecialised
def rsaft_adamw_coefficients_kernel(
    norm,
    norm_inf,
    first_inf,
    scaler_inf,
    grad_scale,
    skip_out,
    skipped,
    hyper,
    addresses,
    group,
    steps,
    coefficients,
    tensors,
    ROW_GRAD: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    RELEASED: tl.constexpr,
    COUNT: tl.constexpr,
    TENSORS_BLOCK: tl.constexpr,
):
    """Write the coefficients of a table: one program for TENSORS_BLOCK tensors."""
    skip = skip_flag(tl.load(norm_inf), first_inf, scaler_inf)
    if COUNT:
        if tl.program_id(0) == 0:
            note_skip(skip, skip_out, skipped)
    write_coefficients(
        addresses, group, steps, coefficients, hyper, tensors, tl.program_id(0) * TENSORS_BLOCK, tl.load(norm), skip,
        unscaling(grad_scale), ROW_GRAD, N_HYPER, N_COEFFICIENTS, RELEASED, TENSORS_BLOCK,
    )  # fmt: skip


def step_arguments(inputs) -> tuple:
    """Give the kernels' arguments of a step, besides its norm; None is an argument of its own kind to Triton."""
    scalars = inputs.scalars
    first_inf = None if inputs.first is None else inputs.first.found_inf
    return first_inf, inputs.found_inf, inputs.grad_scale, scalars.skip, scalars.skipped, scalars.hyper


def table_arguments(table: TensorTable) -> tuple:
    """Give the kernels' arguments of a table."""
    return table.addresses, table.group, table.steps, table.coefficients, len(table)


def kinds(inputs) -> tuple:
    """Name what the compiled form depends on: each optional flag's dtype, and whether tensors step one by one."""
    optional = None if inputs.first is None else inputs.first.found_inf, inputs.found_inf, inputs.grad_scale
    return *(None if tensor is None else tensor.dtype for tensor in optional), inputs.released


def constants(released: bool) -> dict:
    """Give the compile-time arguments that both kernels take."""
    sizes = dict(N_HYPER=len(HYPER), N_COEFFICIENTS=len(COEFFICIENTS), TENSORS_BLOCK=TENSORS_BLOCK)
    return dict(ROW_GRAD=ROW["grad"], RELEASED=released) | sizes | OPTIONS


def variant(first_inf, scaler_inf, grad_scale, released: bool, count: bool) -> tuple:
    """Choose kernel and constants for `launcher`."""
    return rsaft_adamw_coefficients_kernel, constants(released) | dict(COUNT=count)


def adamw_coefficients(tables: list[TensorTable], norm, inputs, count: bool = True) -> None:
    """Write the AdamW coefficients of all tables.

    `count`: the first of these tables writes the skip flag and counts a skip.
    """
    for index, table in enumerate(tables):
        launch = launcher(variant, table.device, *kinds(inputs), count and index == 0)
        grid = triton.cdiv(len(table), TENSORS_BLOCK), 1, 1
        with on(table.device):
            launch(grid, norm.norm, norm.found_inf, *step_arguments(inputs), *table_arguments(table))
