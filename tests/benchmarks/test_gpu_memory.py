"""Every part of `gpu_memory.py` at tiny size on the CPU, and that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from builders.tiny_models import tiny_keys
from peft.tuners.lora import LoraLayer
from torch.nn.attention import SDPBackend, sdpa_kernel

from rsaft_fast import phases
from rsaft_fast.benchmarks import gpu_memory
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_measure import KINDS, Measurements, estimated, kernel_shares, kind_of, rollout_calls
from rsaft_fast.benchmarks.results import load
from rsaft_fast.estimate.skeleton import pipeline_parts
from rsaft_fast.recipe.check import check_settings

CPU = torch.device("cpu")


def measure(run, parts, folder, device=CPU):
    rows = {row["part"]: row for row in Measurements(run, tiny_keys(run.model, folder), device).rows(parts)}
    for row in rows.values():
        json.dumps(row)
    return rows


# Every model, every way to train; the rest are other pairs of the two.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("sdxl-lora", marks=pytest.mark.slow), "sd35m-lora", "flux-full", "flux-lora-nf4"]
)
def test_the_peak_of_a_run_is_what_was_estimated(tmp_path, name):
    run = runs.run_named(name)
    found = measure(run, [runs.PEAK], tmp_path)[runs.PEAK]
    guess = estimated(run, runs.ESTIMATE, "cpu", tiny_keys(run.model, tmp_path))
    assert "missing" not in found, found
    assert max(found["peaks"].values()) == found["peak"]
    assert {phases.SAMPLING, phases.SCORING, phases.DECODER, phases.DENOISER} <= found["peaks"].keys()
    # Where gradients are released, the update is part of the denoiser's phase; in plain torch it makes copies in fp32.
    for name in (phases.DECODER, phases.DENOISER) if run.lora else (phases.DECODER,):
        assert guess["peaks"][name] == pytest.approx(found["peaks"][name], rel=0.03, abs=16_384), name
    assert sum(found["phase_ms"].values()) == pytest.approx(found["ms"], rel=0.1)


def policy_keys(run, folder):
    """The tiny model's keys, and small rewards in place of the recipe's, of which GARDO wants several."""
    keys = tiny_keys(run.model, folder)
    clip = {"name": "pickscore", "path": keys.pop("reward.path")}
    if "gardo" not in run.name:
        return keys | {"reward": clip}
    other = {"name": "clipscore", "path": clip["path"], "weight": 0}
    parts = {"name": "combination", "parts": [clip | {"label": "proxy"}, other, other | {"label": "second"}]}
    return keys | {"reward": parts, "method.gardo.diversity.features": "playground/fair"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3-nft", "flux-gardo"])
def test_the_peak_of_a_policy_gradient_is_what_was_estimated(tmp_path, name):
    run = runs.run_named(name)
    # In bf16 adapters are multiplied in three parts on a GPU, which at this width outweighs the rest.
    keys = policy_keys(run, tmp_path) | {"backbone.dtype": "fp32"}
    found = next(row for row in Measurements(run, keys, CPU).rows([runs.PEAK]) if row["part"] == runs.PEAK)
    guess = estimated(run, runs.ESTIMATE, "cpu", keys)
    assert "missing" not in found, found
    for name in (phases.SAMPLING, phases.DENOISER):
        assert guess["peaks"][name] == pytest.approx(found["peaks"][name], rel=0.06), name


@pytest.mark.slow
def test_every_other_part_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("rsaft_fast.benchmarks.memory_measure.UPDATES", 1)
    run = runs.run_named("sd15-lora")
    parts = [part for part in run.parts() if part != runs.PEAK]
    found = measure(run, parts, tmp_path)
    assert [part for part in parts if "missing" in found[part]] == []
    assert found[runs.CARD]["copy_gbps"] > 0 and found[runs.CARD]["matmul_tflops"] > 0
    assert set(found[runs.TIME]["kinds"]) == {"exact", "graded_only", "plain method"}
    for kind in found[runs.TIME]["kinds"].values():
        assert 0 < kind["call_ms"] < kind["ms"] and kind["denoiser_ms"] > 0
    assert found[runs.TIME]["kinds"]["exact"]["rollouts"] == 2
    kernels = found[runs.KERNELS]
    # Of a UNet under checkpointing: the call, once more, and at least as much again backward.
    assert 2.5 < kernels["graded"]["flops"] / kernels["call"]["flops"] < 4.5 and kernels["call"]["shares"] is None
    assert found[runs.PLAIN_UNCHECKED]["peak"] > 1.5 * found[runs.PLAIN]["peak"]
    assert found[runs.WHOLE]["steps"] == 50


def test_what_fails_is_a_row_and_the_next_part_is_measured(tmp_path, monkeypatch):
    run = runs.run_named("sd15-lora")
    measurements = Measurements(run, tiny_keys(run.model, tmp_path), CPU)

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    measurements.updates = too_much
    monkeypatch.setattr("rsaft_fast.benchmarks.memory_measure.random_pipeline", too_much)
    rows = {row["part"]: row for row in measurements.rows([runs.PEAK, runs.PLAIN])}
    assert rows[runs.PEAK]["failed"] is True and "out of memory" in rows[runs.PEAK]["missing"]
    assert rows[runs.PLAIN]["out_of_memory"] is True, "of the plain step it is a result"


def test_a_key_that_this_version_lacks_is_missing_not_failed(tmp_path):
    run = runs.Run("odd", "sd15", 5, {"backbone.quantize_harder": "yes"})
    row = measure(run, [runs.PEAK], tmp_path)[runs.PEAK]
    assert row["failed"] is False and "backbone.quantize_harder" in row["missing"]


@pytest.mark.parametrize("run", runs.RUNS, ids=lambda run: run.name)
def test_recipes_hold_together_on_a_gpu(run):
    """Here, where there is none, as far as keys go."""
    family = pipeline_parts(runs.MODELS[run.model].path)[0]
    for part in (part for part in run.parts() if part in (runs.PEAK, runs.PEAK_K)):
        check_settings(runs.config_of(run.recipe("cuda", {}, part)), family)
    for part in runs.SPEEDS if run.compare else ():
        check_settings(runs.config_of(run.recipe("cuda", {}, part)), family)


def test_calls_of_every_kind_of_update():
    def calls(**keys):
        run = runs.run_named("sd15-lora")
        return rollout_calls(runs.config_of(run.recipe("cpu", {}) | keys))

    assert calls() == (4, 4)
    assert calls(**{"smoothing.resample": "graded_only"}) == (4, 1)
    assert calls(**{"smoothing": None}) == (4,)


def test_flops_of_a_transformer_by_hand(tmp_path):
    run = runs.run_named("flux-lora")
    measurements = Measurements(run, tiny_keys(run.model, tmp_path), CPU)
    with sdpa_kernel(SDPBackend.MATH):  # as products, which are counted on the CPU too
        counted = {name: found["flops"] for name, found in measurements.kernels().items()}
    backbone = measurements.trained_by(measurements.config()).backbone
    products, adapters = [], []

    def base(module, args, out):
        products.append(2 * out.numel() * module.in_features)

    def adapter(module, args, out):
        tokens, rank = args[0].shape[:-1].numel(), 4
        adapters.append(2 * tokens * rank * (args[0].shape[-1] + out.shape[-1]))

    for name, module in backbone.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            module.register_forward_hook(base)
        elif isinstance(module, LoraLayer):
            module.register_forward_hook(adapter)
    with torch.no_grad():
        branch = backbone.random_conditioning(1).positive
        latents = torch.zeros(1, *backbone.latent_shape)
        backbone.predict(latents, backbone.schedule(1)[0], branch)
    length, width, blocks = 64 + 512, 16, 2
    attention = 2 * 2 * length**2 * width * blocks  # q k^T and the weighted sum of v
    forward = sum(products) + sum(adapters) + attention
    assert counted["call"] == pytest.approx(forward, rel=1e-6)
    # Beside the forward pass: most of it once more under checkpointing, and backward: attention's two products have
    # four; an adapter's two have four; a frozen weight's has the one for its input, where what is trained lies before.
    beside = counted["graded"] - counted["call"]
    assert 3 * attention + 2 * sum(adapters) < beside <= forward + 2 * attention + 2 * sum(adapters) + sum(products)


def test_kernels_by_their_names():
    assert kind_of("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT") == "products"
    assert kind_of("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64") == "products"
    assert kind_of("void cudnn::engines_precompiled::nhwcToNchwKernel") == list(KINDS)[-1]
    assert kind_of("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc") == "products"
    assert kind_of("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>") == "attention"
    assert kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16") == "attention"
    assert kind_of("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>") == list(KINDS)[-1]
    assert kernel_shares(lambda: None, CPU) is None


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_and_goes_on(tmp_path, capsys):
    """Killed at its first row, no warning given; the next run measures the others, and a third has nothing to do."""
    keys = json.dumps({"flux": tiny_keys("flux", tmp_path)})
    arguments = ["--device", "cpu", "--keys", keys, "--runs", "flux-full", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "rsaft_fast.benchmarks.gpu_memory", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, start_new_session=True)
    deadline = time.monotonic() + 180
    # The folder is named after the processor.
    while process.poll() is None and time.monotonic() < deadline:
        if any(load(path)["rows"] for path in tmp_path.glob("*/memory-tiny.json")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # as `timeout` does: the run's own process is in its group
    process.wait()
    (path,) = tmp_path.glob("*/memory-tiny.json")
    first = {(row["run"], row["part"]): row for row in load(path)["rows"]}
    assert first
    assert gpu_memory.main(arguments) == 0
    found = {(row["run"], row["part"]): row for row in load(path)["rows"]}
    assert {part for _, part in found} == {runs.CARD, runs.ESTIMATE, runs.PEAK}
    kept = [place for place in first if place[1] != runs.CARD and "missing" not in first[place]]
    assert all(found[place] == first[place] for place in kept)
    capsys.readouterr()
    assert gpu_memory.main(arguments) == 0 and {(r["run"], r["part"]): r for r in load(path)["rows"]} == found
    said = capsys.readouterr()
    assert "flux-full: peak" not in said.err and "flux-full" in said.out


def test_a_process_that_ends_too_early_or_takes_too_long_is_a_failure(tmp_path, monkeypatch, capsys):
    """What stands in for Python ends at once, or never: neither is waited for, and both are named."""
    keys = json.dumps({"sdxl": tiny_keys("sdxl", tmp_path)})
    arguments = ["--device", "cpu", "--keys", keys, "--runs", "sdxl-full", "--results", str(tmp_path)]
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu_memory, "MARGIN", 0.1)
    for script, budget, code in (("exit 3", "60", 1), ("exec sleep 60", "0.5", 0)):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert gpu_memory.main([*arguments, "--budget", budget]) == code
        said = capsys.readouterr()
        assert ("its process ended with 3" in said.err) == (code == 1)
        assert "sdxl-full: peak" in said.out.split("left out:")[1]


def test_wrong_input_is_one_line(capsys):
    assert gpu_memory.main(["--runs", "sdxl-lorra"]) == 2
    said = capsys.readouterr().err
    assert "'sdxl-lorra'" in said and "sdxl-lora" in said and len(said.splitlines()) == 1
    assert gpu_memory.main(["--device", "cpu"]) == 2
    assert "--keys" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_peaks_are_torchs_own(tmp_path):
    run = runs.run_named("sdxl-lora")
    found = measure(run, [part for part in run.parts() if part != runs.PEAK_K], tmp_path, torch.device("cuda"))
    assert [part for part, row in found.items() if "missing" in row] == []
    peak = found[runs.PEAK]
    assert 0 < peak["peak"] <= peak["reserved"] and peak["peak"] == max(peak["peaks"].values())
    assert sum(peak["phase_ms"].values()) == pytest.approx(peak["ms"], rel=0.2)
    shares = found[runs.KERNELS]["call"]["shares"]
    assert shares is None or sum(shares.values()) == pytest.approx(1, abs=0.3)
