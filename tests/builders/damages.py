"""Ways in which a pipeline's folder can be damaged, each a function of the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 5\n"
Damage = Callable[[Path], None]


def write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def replace(file: Path, how: str) -> None:
    """Put what is no regular file in a file's place."""
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        file.symlink_to(file.parent / "nowhere")
    elif how == "device":
        file.symlink_to("/dev/zero")


CONTENTS: dict[str, Damage] = {
    "empty": partial(write, content=b""),
    "cut": lambda file: write(file, file.read_bytes()[:-7]),
    "lfs": partial(write, content=LFS),
    "list": partial(write, content=b"[1, 2]"),
    "string": partial(write, content=b'"config"'),
    "null": partial(write, content=b"null"),
    "binary": partial(write, content=bytes(range(128, 256)) * 8),
    "utf16": lambda file: write(file, file.read_text().encode("utf-16")),
    "deep": partial(write, content=b"[" * 100_000),
    "nan": lambda file: change(file, odd=float("nan")),
    "infinite": lambda file: write(file, b'{"odd": 1e999}'),
    "digits": lambda file: write(file, b'{"odd": ' + b"9" * 5000 + b"}"),
    "missing": Path.unlink,
    **{how: partial(replace, how=how) for how in ("folder", "pipe", "link", "device")},
}
"""Of any JSON file."""


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def drop(file: Path, key: str) -> None:
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))


def retensor(file: Path, how: str) -> None:
    """Change a safetensors file that stays readable."""
    state = load_file(file)
    name = max(state, key=lambda name: state[name].numel())
    if how == "key missing":
        del state[name]
    elif how == "key too many":
        state["nobody.weight"] = torch.zeros(3)
    elif how == "key renamed":
        state["nobody.weight"] = state.pop(name)
    elif how == "shape":
        state[name] = state[name][..., :-1].contiguous()
    elif how == "transposed":
        state[name] = state[name].flatten(1).T.contiguous()
    elif how == "none":
        state = {}
    save_file(state, file, metadata={"format": "pt"})


WEIGHTS: dict[str, Damage] = {
    "empty": partial(write, content=b""),
    "lfs": partial(write, content=LFS),
    "cut": lambda file: write(file, file.read_bytes()[:-64]),
    "header cut": lambda file: write(file, file.read_bytes()[:100]),
    "longer": lambda file: write(file, file.read_bytes() + b"more"),
    "header huge": lambda file: write(file, b"\xff" * 8 + file.read_bytes()[8:]),
    "html": partial(write, content=b"<!DOCTYPE html><html>404</html>"),
    "missing": Path.unlink,
    **{how: partial(replace, how=how) for how in ("folder", "pipe", "link", "device")},
    **{
        how: partial(retensor, how=how)
        for how in ("key missing", "key too many", "key renamed", "shape", "transposed", "none")
    },
}
"""Of a safetensors file."""


def sharded(folder: Path, weight_map: object) -> None:
    file = next(folder.glob("*.safetensors"))
    file.rename(folder / f"{file.stem}-00001-of-00001.safetensors")
    (folder / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def of_kind(part: str) -> str:
    """The name of a component's config."""
    if part == "scheduler":
        return "scheduler/scheduler_config.json"
    return f"{part}/tokenizer_config.json" if part.startswith("tokenizer") else f"{part}/config.json"


def weight_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def on(name: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / name)


def keyed(name: str, **keys) -> Damage:
    return lambda folder: change(folder / name, **keys)


def entry(name: str, value: object) -> Damage:
    return keyed("model_index.json", **{name: value})


def single(folder: Path) -> None:
    """The pipeline's folder becomes one file."""
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


UNET, TRANSFORMER = "unet/config.json", "transformer/config.json"
VAE, SCHEDULER, TEXT = "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"
HUGE = 10**12

PARTICULAR: list[tuple[str, str, Damage]] = [
    ("sd15", "one file", single),
    ("sd15", "no scheduler folder", lambda folder: shutil.rmtree(folder / "scheduler")),
    ("flux", "no tokenizer folder", lambda folder: shutil.rmtree(folder / "tokenizer_2")),
    ("sd3", "vae is a file", lambda folder: (shutil.rmtree(folder / "vae"), (folder / "vae").write_text("x"))),
    ("sd15", "index without class", on("model_index.json", partial(drop, key="_class_name"))),
    ("sd15", "index class list", keyed("model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"])),
    ("sd15", "index class null", keyed("model_index.json", _class_name=None)),
    ("sdxl", "index without unet", on("model_index.json", partial(drop, key="unet"))),
    ("sdxl", "index without tokenizer", on("model_index.json", partial(drop, key="tokenizer_2"))),
    ("sd3", "index vae null", entry("vae", [None, None])),
    ("sd15", "entry of one", entry("unet", ["diffusers"])),
    ("sd15", "entry of numbers", entry("unet", [1, 2])),
    ("sd15", "entry half null", entry("unet", ["diffusers", None])),
    ("sd15", "entry of another library", entry("unet", ["antigravity", "UNet2DConditionModel"])),
    ("sd15", "entry of the folder's own code", entry("unet", ["unet", "UNet2DConditionModel"])),
    ("sd15", "safety checker of another library", entry("safety_checker", ["os", "system"])),
    ("sd15", "another component", entry("controlnet", ["diffusers", "ControlNetModel"])),
    ("sd15", "entry of another class", entry("unet", ["diffusers", "UNet2DModel"])),
    ("sdxl", "vae of another class", entry("vae", ["diffusers", "AutoencoderTiny"])),
    ("sdxl", "text encoder without projection", entry("text_encoder_2", ["transformers", "CLIPTextModel"])),
    ("sd15", "text encoder of no class", entry("text_encoder", ["transformers", "NoSuchModel"])),
    ("sd15", "scheduler of no class", entry("scheduler", ["diffusers", "NoSuchScheduler"])),
    ("sd15", "scheduler that is none", entry("scheduler", ["diffusers", "UNet2DConditionModel"])),
    ("flux", "scheduler that is no flow's", entry("scheduler", ["diffusers", "DDIMScheduler"])),
    ("sd15", "tokenizer of another class", entry("tokenizer", ["transformers", "T5Tokenizer"])),
    ("sd15", "config of another class", keyed(UNET, _class_name="UNet2DModel")),
    ("sd3", "text config of another model", keyed("text_encoder_3/config.json", model_type="bert")),
    ("sd15", "unet quantised", keyed(UNET, quantization_config={"quant_method": "bitsandbytes"})),
    ("flux", "text encoder quantised", keyed("text_encoder_2/config.json", quantization_config="fp8")),
    ("sd15", "sample_size null", keyed(UNET, sample_size=None)),
    ("sd15", "sample_size text", keyed(UNET, sample_size="64")),
    ("sdxl", "sample_size oblong", keyed(UNET, sample_size=[64, 96])),
    ("sd15", "sample_size zero", keyed(UNET, sample_size=0)),
    ("sd15", "sample_size negative", keyed(UNET, sample_size=-64)),
    ("sd3", "sample_size null (sd3)", keyed(TRANSFORMER, sample_size=None)),
    ("sd3", "patch_size zero", keyed(TRANSFORMER, patch_size=0)),
    ("sd3", "positions huge", keyed(TRANSFORMER, pos_embed_max_size=10**5)),
    ("sd3", "layers huge", keyed(TRANSFORMER, num_layers=10**7)),
    ("flux", "layers negative", keyed(TRANSFORMER, num_layers=-1)),
    ("flux", "layers text", keyed(TRANSFORMER, num_layers="many")),
    ("flux", "axes list", keyed(TRANSFORMER, axes_dims_rope=None)),
    ("flux", "in_channels huge", keyed(TRANSFORMER, in_channels=HUGE)),
    ("flux", "heads null", keyed(TRANSFORMER, num_attention_heads=None)),
    ("sd15", "layers per block huge", keyed(UNET, layers_per_block=HUGE)),
    ("sd15", "layers per block list", keyed(UNET, layers_per_block=[1, 10**8])),
    ("sd15", "channels list empty", keyed(UNET, block_out_channels=[])),
    ("sd15", "channels list null", keyed(UNET, block_out_channels=None)),
    ("sd15", "block types unknown", keyed(UNET, down_block_types=["NoBlock2D", "DownBlock2D"])),
    ("sd15", "attention width", keyed(UNET, cross_attention_dim="wide")),
    ("sd15", "groups zero", keyed(UNET, norm_num_groups=0)),
    ("sd15", "inpainting unet", keyed(UNET, in_channels=9)),
    ("sd15", "learned variance", keyed(UNET, out_channels=8)),
    ("sd15", "class labels", keyed(UNET, num_class_embeds=10)),
    ("sd15", "image embeddings", keyed(UNET, encoder_hid_dim_type="image_proj", encoder_hid_dim=16)),
    ("sdxl", "added embedding", keyed(UNET, addition_embed_type="image")),
    ("sdxl", "time ids", keyed(UNET, projection_class_embeddings_input_dim=None)),
    ("sd15", "guidance embedding", keyed(UNET, time_cond_proj_dim=16)),
    ("sd15", "activation unknown", keyed(UNET, act_fn="no_act")),
    ("sd15", "vae scale zero", keyed(VAE, scaling_factor=0)),
    ("sd15", "vae scale null", keyed(VAE, scaling_factor=None)),
    ("sd15", "vae scale text", keyed(VAE, scaling_factor="0.18215")),
    ("flux", "vae shift list", keyed(VAE, shift_factor=[0.1])),
    ("sd15", "vae shift unread", keyed(VAE, shift_factor=0.1)),
    ("sd3", "vae mean unread", keyed(VAE, latents_mean=[0.1] * 4, latents_std=[1.0] * 4)),
    ("sdxl", "vae mean alone", keyed(VAE, latents_mean=[0.1] * 4)),
    ("sdxl", "vae mean of another length", keyed(VAE, latents_mean=[0.1] * 3, latents_std=[1.0] * 3)),
    ("sdxl", "vae std zero", keyed(VAE, latents_mean=[0.1] * 4, latents_std=[1.0, 0.0, 1.0, 1.0])),
    ("sdxl", "vae std text", keyed(VAE, latents_mean=["a"] * 4, latents_std=["b"] * 4)),
    ("sd15", "vae channels text", keyed(VAE, latent_channels="4")),
    ("sd15", "vae blocks null", keyed(VAE, block_out_channels=None)),
    ("sd15", "betas unknown", keyed(SCHEDULER, beta_schedule="cubic")),
    ("sd15", "betas text", keyed(SCHEDULER, beta_start="small")),
    ("sd15", "timesteps null", keyed(SCHEDULER, num_train_timesteps=None)),
    ("sd15", "timesteps huge", keyed(SCHEDULER, num_train_timesteps=HUGE)),
    ("sdxl", "timesteps continuous", keyed(SCHEDULER, timestep_type="continuous")),
    ("sdxl", "flow sigmas", keyed(SCHEDULER, use_flow_sigmas=True)),
    ("flux", "stochastic flow", keyed(SCHEDULER, stochastic_sampling=True)),
    ("flux", "inverted flow", keyed(SCHEDULER, invert_sigmas=True)),
    ("flux", "shift text", keyed(SCHEDULER, base_shift="big")),
    ("flux", "shift between equal lengths", keyed(SCHEDULER, base_image_seq_len=4096)),
    ("sd3", "shift infinite", keyed(SCHEDULER, shift=None)),
    ("sd15", "text layers huge", keyed(TEXT, num_hidden_layers=10**9)),
    ("sd15", "text layers more", keyed(TEXT, num_hidden_layers=3)),
    ("sd15", "text layers fewer", keyed(TEXT, num_hidden_layers=1)),
    ("sd15", "text heads zero", keyed(TEXT, num_attention_heads=0)),
    ("sd15", "text width text", keyed(TEXT, hidden_size="16")),
    ("sd15", "text width list", keyed(TEXT, hidden_size=[16])),
    ("sd15", "text dtype", keyed(TEXT, dtype="float99", hidden_size=24)),
    ("sd15", "text activation", keyed(TEXT, hidden_act="no_act")),
    ("sd15", "text vocabulary", keyed(TEXT, vocab_size=10)),
    ("sd15", "text positions", keyed(TEXT, max_position_embeddings=8)),
    ("sd3", "t5 vocabulary", keyed("text_encoder_3/config.json", vocab_size=10**6)),
    ("sd15", "tokenizer without limit", on("tokenizer/tokenizer_config.json", partial(drop, key="model_max_length"))),
    ("sd15", "tokenizer limit huge", keyed("tokenizer/tokenizer_config.json", model_max_length=HUGE)),
    ("sd15", "tokenizer of another kind", keyed("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")),
    ("sd15", "tokenizer without words", on("tokenizer/tokenizer.json", Path.unlink)),
    ("flux", "t5 tokenizer without words", on("tokenizer_2/tokenizer.json", Path.unlink)),
    ("sd15", "tokenizer words damaged", on("tokenizer/tokenizer.json", partial(write, content=b"{}"))),
    ("sd15", "tokenizer words lfs", on("tokenizer/tokenizer.json", partial(write, content=LFS))),
    ("sd15", "tokenizer words a pipe", on("tokenizer/tokenizer.json", partial(replace, how="pipe"))),
    ("sd15", "shards of no map", on("unet", partial(sharded, weight_map=[]))),
    ("sd15", "shards elsewhere", on("unet", partial(sharded, weight_map={"a": "../vae/x.safetensors"}))),
    ("sd15", "shards missing", on("unet", partial(sharded, weight_map={"a": "model-00001-of-00002.safetensors"}))),
    ("sd15", "weights under another name", lambda folder: weight_file(folder, "unet").rename(folder / "unet/x.bin")),
]

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
PARTS = {
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"),
    "sd3": ("transformer", "vae", "text_encoder_3", "tokenizer_3", "scheduler"),
    "flux": ("transformer", "vae", "text_encoder_2", "tokenizer_2", "scheduler"),
}
NETWORKS = 3  # the first of each family's parts


def systematic(every: bool) -> Iterator[tuple[str, str, Damage]]:
    """Each damage of a file on the families and their parts in turn, or on all of them."""
    for index, (how, damage) in enumerate(CONTENTS.items()):
        for family in FAMILIES if every else (FAMILIES[index % 4],):
            yield family, f"index {how}", on("model_index.json", damage)
            for part in PARTS[family] if every else (PARTS[family][index // 2 % 5], PARTS[family][index % 5]):
                # A tokenizer needs no config of its own.
                if not part.startswith("tokenizer") or how != "missing":
                    yield family, f"{part} config {how}", on(of_kind(part), damage)
    for index, (how, damage) in enumerate(WEIGHTS.items()):
        for family in FAMILIES if every else (FAMILIES[index % 4],):
            for part in PARTS[family][:NETWORKS] if every else (PARTS[family][index % 3], PARTS[family][2]):
                yield (
                    family,
                    f"{part} weights {how}",
                    lambda folder, part=part, damage=damage: damage(weight_file(folder, part)),
                )
