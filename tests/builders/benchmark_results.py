"""Results as a GPU run would write them, with figures made from the floors: every expected value follows by hand."""

from __future__ import annotations

from rsaft_fast.benchmarks.providers import EAGER, IMAGE_PASS
from rsaft_fast.benchmarks.results import Results
from rsaft_fast.benchmarks.shapes import PASSES, floor, parameters_of, shapes_of

COPY, READ = 3000.0, 3100.0

HEAD = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05Z",
    "rsaft_fast": "0.1.0",
    "copy_gbps": COPY,
    "copy_way": "torch copy_ (memcpy)",
    "read_gbps": READ,
    "read_way": "torch sum",
}

# Time over the time that the floor takes at copy bandwidth.
SLOWNESS = {"ours-cuda": 1.05, "ours-triton": 1.1, "usual-fused": 2.0, "adamw-alone": 1.07, "foreach": 1.8}


def results(
    folder=None, cases=(("sdxl-full", "fp32"), ("sdxl-full", "bf16"), ("sdxl-lora32", "fp32")), **head
) -> Results:
    found = Results("speed", HEAD | head, folder)
    for case, dtype in cases:
        for what in PASSES:
            for provider, slowness in SLOWNESS.items():
                if provider != "adamw-alone" or what == "step":
                    add_pass(found, what, case, dtype, provider, slowness)
    for batch, side in ((32, 1024), (4, 512)):
        elements = batch * 3 * side * side
        for provider, slowness in (("ours-cuda", 1.1), (EAGER, 2.2)):
            ms = 16 * elements * slowness / COPY / 1e6
            row = {"what": IMAGE_PASS, "case": f"{batch}x3x{side}x{side}", "dtype": "fp32", "provider": provider}
            found.put(row | times(ms) | {"parameters": elements}, 16 * elements)
    for what, us in (("host-static", 50.0), ("host-checked", 900.0)):
        row = {"what": what, "case": "sdxl-lora32", "dtype": "fp32", "provider": "ours-cuda"}
        found.put(row | times(us / 1e3) | {"parameters": parameters_of("sdxl-lora32"), "tensors": 1120})
    missing = {"what": "update", "case": "sdxl-full", "dtype": "fp32", "provider": "optimi"}
    found.put(missing | {"missing": "not installed (pip install torch-optimi)"})
    return found


def add_pass(found: Results, what, case, dtype, provider, slowness, **extra) -> dict:
    parameters = parameters_of(case)
    moved = floor(what, dtype) * parameters
    ours = provider.startswith("ours")
    row = {"what": what, "case": case, "dtype": dtype, "provider": provider}
    row |= times(moved * slowness / COPY / 1e6) | {"parameters": parameters, "tensors": len(shapes_of(case))}
    row |= {"launches": 5 if ours else 5000, "copies": 0 if ours else 3, "alternated": "call"}
    row |= {"extra_bytes": 0 if ours else 4 * parameters, "held_bytes": 12 * parameters}
    return found.put(row | extra, moved)


def times(ms: float) -> dict:
    return {"ms_p20": 0.99 * ms, "ms_p50": ms, "ms_p80": 1.02 * ms, "host_ms": 0.05, "calls": 20}
