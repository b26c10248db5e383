"""Random tables for the tests: odd sizes, misaligned views, channels-last and transposed layouts, absent gradients."""

import torch

from rsaft_fast.abi.quantize import dequantize_blocks, quantize_blocks
from rsaft_fast.ops import CHUNK, TensorTable

SIZES = ((0,), (1,), (7,), (3, 5), (CHUNK - 1,), (2, 3, 4, 5), (CHUNK + 1,))
LOW = (torch.bfloat16, torch.float16)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element off a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def arrange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "misaligned":
        return misaligned(tensor)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return tensor.clone()


def poison(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory to be written: NaN everywhere, so that an element left out shows."""
    return torch.full_like(like, float("nan"), dtype=dtype or like.dtype)


def memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a dense tensor as they lie in memory, a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def to_codes(values: torch.Tensor, signed: bool, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes in the layout of the values, and their absmax."""
    codes = torch.empty_like(values, dtype=torch.uint8)
    if layout == "misaligned":
        codes = misaligned(codes)
    flat_codes, absmax = quantize_blocks(memory_order(values), signed)
    memory_order(codes).copy_(flat_codes)
    return codes, absmax


def decoded(table: TensorTable, name: str) -> list[torch.Tensor]:
    """A list of moments as float32 values, whatever holds them."""
    if table.dtypes[name] is not torch.uint8:
        return [t.clone() for t in table[name]]
    out = []
    for codes, absmax in zip(table[name], table[name + "_absmax"]):
        values = torch.empty_like(codes, dtype=torch.float32)
        memory_order(values).copy_(dequantize_blocks(memory_order(codes), absmax, name == "exp_avg"))
        out.append(values)
    return out


def random_table(
    device,
    dtype,
    generator,
    sizes=SIZES,
    layout="plain",
    absent=(),
    master=False,
    adaptive=False,
    state_bits=32,
    **options,
):
    """A table with weight, grad, moments and master or (poisoned) backup, and float64 copies of all of them."""

    def draw(scale, positive=False, kind=dtype):
        values = [torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in sizes]
        values = [v.abs() if positive else v for v in values]
        return [arrange(v.to(kind), layout).to(device) for v in values]

    state = torch.promote_types(dtype, torch.float32)
    lists = {
        "weight": draw(0.5),
        "grad": [None if i in absent else g for i, g in enumerate(draw(2.0))],
        "exp_avg": draw(0.1, kind=state),
        "exp_avg_sq": draw(0.01, positive=True, kind=state),
    }
    if master:
        nudge = torch.finfo(dtype).eps / 16
        lists["master"] = [w.to(state) * (1 + nudge) for w in lists["weight"]]
    else:
        lists["backup"] = [poison(w) for w in lists["weight"]]
    if state_bits == 8:
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            pairs = [to_codes(values, signed, layout) for values in lists[name]]
            lists[name], lists[name + "_absmax"] = map(list, zip(*pairs))
    table = TensorTable(lists["weight"], adaptive=adaptive, **options)
    table.bind(**lists)
    before = {k: [None if t is None else t.detach().double().cpu().clone() for t in v] for k, v in lists.items()}
    for name in ("exp_avg", "exp_avg_sq"):
        before[name] = [values.double().cpu() for values in decoded(table, name)]
    return table, before


def flat(tensors) -> torch.Tensor:
    parts = [t.detach().double().cpu().reshape(-1) for t in tensors if t is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def bits(tensors) -> list[torch.Tensor]:
    """Bit patterns, so that NaN equals itself and -0 differs from 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.detach().cpu().clone().reshape(-1).view(kinds[t.element_size()]) for t in tensors if t is not None]


def same_bits(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))
