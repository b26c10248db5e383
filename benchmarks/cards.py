"""What cards could do, by their data sheets, and the times that this predicts: no device and no model is needed."""

from __future__ import annotations

from collections.abc import Mapping

DENSE_BF16 = {
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "H200": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""TFLOP/s, bf16 without sparsity, fp32 accumulation: NVIDIA's data sheets of the cards (halved where they count sparse
operations) and its Ada and GA102 whitepapers. The first name that the device's contains counts."""


def dense_bf16(gpu: str) -> float | None:
    """TFLOP/s of a device by its name; None for one that is not in the table."""
    return next((rate for name, rate in DENSE_BF16.items() if name in gpu), None)


def predicted_ms(counted: Mapping[str, int], branches: int, steps: int, tflops: float) -> dict[str, float]:
    """Milliseconds of a step of every kind if everything ran at `tflops`, whatever is recomputed or memory-bound left
    out: what a first measurement is judged against.

    Two decodes and one scoring with gradient go with each pass: `observe`, then the decoder's own backward pass. The
    step in plain PyTorch keeps its graphs, and so neither decodes nor makes the graded call a second time.
    """
    rate = tflops * 1e9  # FLOPs a millisecond
    call = branches * counted["call"] / rate
    graded = branches * counted["graded"] / rate
    ends = (counted["decode"] + counted["decode_graded"] + counted["score_graded"]) / rate
    one_pass = graded + ends
    return {
        "call": call,
        "graded": graded,
        "ends": ends,
        "plain method": steps * call + one_pass,
        "graded_only": (steps + 1) * call + 2 * one_pass,
        "exact": 2 * (steps * call + one_pass),
        "plain PyTorch": 2 * ((steps - 1) * call + one_pass - counted["decode"] / rate),
    }
