"""Tiny models in the layout of published ones, as recipe keys: for `gpu_memory.py` where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rsaft_fast.backbones.published import published_pipeline
from rsaft_fast.benchmarks.memory_runs import MODELS


def tiny_keys(model: str, folder: Path) -> dict[str, Any]:
    """Write config files of the published architecture, changed by tiny_models.json; the keys that lead there."""
    small = json.loads(Path(__file__).with_name("tiny_models.json").read_text(encoding="utf-8"))
    clip = {"projection_dim": 16, "text_config": small["text"], "vision_config": small["vision"]}
    family, parts = published_pipeline(MODELS[model].path)
    files = {"clip/config.json": clip | {"model_type": "clip"}}
    index = {"_class_name": family.pipeline_class.__name__}
    for name, (library, kind, config) in parts.items():
        key = model if name == family.denoiser_name else "text" if kind.startswith("CLIP") else kind
        file = next((f"{kind}_" for kind in ("scheduler", "tokenizer") if name.startswith(kind)), "")
        files[f"{model}/{name}/{file}config.json"] = {**config, **small.get(key, {})}
        if file == "tokenizer_":
            encoder = parts[name.replace("tokenizer", "text_encoder")][1]
            kind = ("CLIP" if encoder.startswith("CLIP") else "T5") + "Tokenizer"
            files[f"{model}/{name}/tokenizer.json"] = {}  # looked for, and on shapes alone not read
        index[name] = [library, kind]
    for file, content in (files | {f"{model}/model_index.json": index}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    keys = {"backbone.path": str(folder / model), "backbone.height": 32, "backbone.width": 32}
    return keys | {"reward.path": str(folder / "clip"), "parameters.lora.rank": 4}
