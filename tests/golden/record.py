"""Record what training gives, to the bit, so that a change of structure can be held against it.

    python tests/golden/record.py before.json                   every case, each as it is done; again goes on
    python tests/golden/record.py after.json --against before.json

Everything goes in and out by doors that stay: a recipe, the command line, the files of a run folder, `estimate --json`.
The bits depend on the processor, on torch's version and on the number of threads: compare two trees on one machine.
Seconds are left out. Exit code 1 when anything differs, with the first figures that do.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from builders.recipes import Tiny, recipe, write_tiny
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from rsaft_fast.cli import main

UPDATES = 4
TIMES = ("seconds",)  # the ends of metrics' names that tell time

METHODS: dict[str, dict[str, Any]] = {
    "refl": {"name": "refl"},
    "draft": {"name": "draft", "k": 2},
    "draft_lv": {"name": "draft_lv"},
    "alignprop": {"name": "alignprop"},
    "drtune": {"name": "drtune"},
}
IMAGE, PARAMETERS = {"radius": 0.3}, {"rho": 0.2}
SMOOTHINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "image": {"image": IMAGE, "parameters": None},
    "parameters": {"image": None, "parameters": PARAMETERS},
    "both": {"image": IMAGE, "parameters": PARAMETERS},
}
FULL_8BIT = {
    "backbone__dtype": "bf16",
    "optimizer__state_bits": 8,
    "optimizer__stochastic_rounding": True,
    "optimizer__backup": "gradient",
    "optimizer__release_gradients": True,
}
CHECKPOINTED = {"backbone__checkpoint": ["denoiser", "decoder-strips"]}


def playground(method: dict[str, Any], smoothing: dict[str, Any] | None) -> dict[str, Any]:
    """The shipped playground's recipe in small."""
    return {
        "max_steps": UPDATES,
        "checkpoint_every": UPDATES,
        "backbone": {"path": "playground"},
        "parameters": {"train": "full"},
        "sampler": {"steps": 5},
        "method": method,
        "smoothing": smoothing,
        "sharpness": {"radius": 1.0},
        "reward": {"path": "playground/fair"},
        "data": {"prompts": "playground", "batch_size": 2},
        "optimizer": {"lr": 5e-5},
        "samples": {"every": UPDATES, "prompts": "playground", "count": 2},
        "logging": {"tensorboard": False},
    }


def on_tiny(tiny: Tiny, family: str, **keys: Any) -> dict[str, Any]:
    """DRaFT-1 with both smoothings on a tiny pipeline of that family."""
    common = {"max_steps": UPDATES, "checkpoint_every": UPDATES, "sampler__steps": 3}
    common |= {"samples": {"every": UPDATES, "count": 2}, "smoothing": SMOOTHINGS["both"]}
    return recipe(tiny, Path("unused"), family, **(common | keys))


def cases(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run: its name and its recipe, without the folder."""
    for method, settings in METHODS.items():
        for smoothing, balls in SMOOTHINGS.items():
            yield f"playground {method} {smoothing}", playground(settings, balls)
    for family in ("sd15", "sdxl", "sd3", "flux"):
        yield f"{family} lora", on_tiny(tiny, family)
        yield f"{family} full", on_tiny(tiny, family, parameters__train="full")
        yield f"{family} lora ema accumulate", on_tiny(tiny, family, ema={"decay": 0.9}, data__accumulate=2)
        yield (
            f"{family} lora checkpointed guided",
            on_tiny(tiny, family, **CHECKPOINTED, sampler__guidance_scale=3.0, method={"name": "draft_lv"}),
        )
        yield f"{family} lora bf16", on_tiny(tiny, family, backbone__dtype="bf16")
        yield f"{family} lora offloaded blocks", on_tiny(tiny, family, **CHECKPOINTED, backbone__offload_blocks=1)
        yield f"{family} full 8-bit released", on_tiny(tiny, family, parameters__train="full", **FULL_8BIT)
        yield (
            f"{family} full state on the host",
            on_tiny(tiny, family, parameters__train="full", optimizer__offload="state"),
        )
        for quantize in ("int8", "nf4"):
            yield f"{family} lora {quantize}", on_tiny(tiny, family, backbone__quantize=quantize)
    yield "sd15 lora denoising", on_tiny(tiny, "sd15", denoising={"images": str(tiny.clip.parent / "captioned")})


def write_captioned(folder: Path) -> None:
    """Three small pictures with captions, for the denoising loss."""
    folder.mkdir()
    for index in range(3):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}\n")


def run(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train by that recipe; what came out: hashes of every tensor file and picture, and the logged figures."""
    recipe_file = folder.with_suffix(".yaml")
    recipe_file.write_text(yaml.safe_dump(raw | {"output_dir": str(folder)}))
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
        code = main(["train", str(recipe_file)])
    if code != 0:
        return {"exit": code, "said": noise.getvalue().splitlines()[-1:]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]
    files = sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.png"))
    return {"metrics": metrics, "files": {str(file.relative_to(folder)): content_hash(file) for file in files}}


def content_hash(file: Path) -> str:
    """Of the tensors by name, or of the pixels: how a file is packed does not count."""
    digest = hashlib.sha256()
    if file.suffix == ".png":
        digest.update(Image.open(file).convert("RGB").tobytes())
    else:
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def estimated(recipe_file: Path) -> dict[str, Any]:
    """`rsaft-fast estimate --json` of a shipped recipe."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(["estimate", str(recipe_file), "data.prompts=playground", "--quick", "--json"])
    return json.loads(out.getvalue()) if code == 0 else {"exit": code}


def differences(before: dict[str, Any], after: dict[str, Any], where: str = "") -> Iterator[str]:
    """Lines about what is not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{where} / {key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after)):
            yield from differences(*pair, f"{where} / {index}")
    elif before != after:
        yield f"{where}: {before} -> {after}"


def record(file: Path, only: str) -> dict[str, Any]:
    """Run what the file does not hold yet, and write it after each."""
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def add(name: str, result: dict[str, Any]) -> None:
        done[name] = result
        file.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        tiny = write_tiny(Path(temporary))
        write_captioned(Path(temporary) / "captioned")
        runs = [(name, raw) for name, raw in cases(tiny) if only in name and name not in done]
        for index, (name, raw) in enumerate(tqdm(runs, unit="run")):
            add(name, run(raw, Path(temporary) / f"run{index}"))
        shipped = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
        for recipe_file in tqdm(shipped, unit="estimate"):
            name = f"estimate {recipe_file.stem}"
            if only in name and name not in done:
                add(name, estimated(recipe_file))
    return done


def compare() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON to write, or to go on with")
    parser.add_argument("--against", type=Path, help="an earlier one: say what differs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    options = parser.parse_args()
    now = record(options.file, options.only)
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    found = list(differences({k: before[k] for k in before if options.only in k}, now))
    print("\n".join(found[:40]) or f"{len(now)} cases, all the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(compare())
