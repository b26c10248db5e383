"""Tiny random pipelines in diffusers' own format: the real classes, tokenizers and schedulers, few weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def tiny_sd15(path: str | Path, seed: int = 0) -> Path:
    """Write a `StableDiffusionPipeline` folder: UNet with epsilon prediction, PNDM config as SD1.5 ships it; 32x32."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    scheduler = PNDMScheduler(
        **_BETAS,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=_tiny_vae(latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip_text_config(16)).eval(),
        tokenizer=byte_tokenizer(Path(path) / "vocabulary"),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, path)


def tiny_sd3(path: str | Path, seed: int = 0, with_t5: bool = True) -> Path:
    """Write a `StableDiffusion3Pipeline` folder: MMDiT with flow matching, three text encoders; 32x32."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    _fill_zero_layers(transformer)
    tokenizer = byte_tokenizer(Path(path) / "vocabulary")
    pipeline = StableDiffusion3Pipeline(
        vae=_tiny_vae(latent_channels=4, scaling_factor=1.5305, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_clip_text_config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text_config(16)).eval(),
        text_encoder_3=T5EncoderModel(_t5_config()).eval() if with_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer() if with_t5 else None,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _save(pipeline, path)


def tiny_sdxl(path: str | Path, seed: int = 0) -> Path:
    """Write a `StableDiffusionXLPipeline` folder: two text encoders, time ids, SDXL's Euler config; 32x32."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = EulerDiscreteScheduler(
        **_BETAS,
        timestep_spacing="leading",
        steps_offset=1,
    )
    # Kept by diffusers in the published file, though Euler knows none of them; DDIM does.
    scheduler.register_to_config(set_alpha_to_one=False, clip_sample=False, sample_max_value=1.0)
    tokenizer = byte_tokenizer(Path(path) / "vocabulary")
    pipeline = StableDiffusionXLPipeline(
        vae=_tiny_vae(latent_channels=4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip_text_config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text_config(16)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    return _save(pipeline, path)


def tiny_flux(path: str | Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a `FluxPipeline` folder: packed latents, dynamic shift, CLIP and T5; dev, or schnell without guidance."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 4, 2),
    )
    _fill_zero_layers(transformer)
    dev = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipeline = FluxPipeline(
        vae=_tiny_vae(latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_text_config(16)).eval(),
        text_encoder_2=T5EncoderModel(_t5_config()).eval(),
        tokenizer=byte_tokenizer(Path(path) / "vocabulary"),
        tokenizer_2=_t5_tokenizer(model_max_length=40),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(dev if guidance_embeds else dict(shift=1.0))),
    )
    return _save(pipeline, path)


def byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer without merges over the byte alphabet (514 tokens, start 512, end 513), context 77."""
    alphabet = _byte_alphabet()
    tokens = alphabet + [character + "</w>" for character in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return tokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        stand_ins.setdefault(byte, chr(256 + len(stand_ins) - len(printable)))
    return [stand_ins[byte] for byte in printable + [b for b in range(256) if b not in printable]]


def _t5_config() -> T5Config:
    return T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.1)


def _fill_zero_layers(transformer) -> None:
    """adaLN's output layers start at zero in some classes, and leave blocks that do nothing: give them weights."""
    for parameter in transformer.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def _t5_tokenizer(**options):
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -float(i)) for i, piece in enumerate(["▁"] + [chr(c) for c in range(33, 127)])]
    return T5Tokenizer(vocab=pieces, extra_ids=0, **options)


def _clip_text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _tiny_vae(latent_channels: int, scaling_factor: float, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    ).eval()


def _save(pipeline, path: str | Path) -> Path:
    pipeline.save_pretrained(path)
    return Path(path)
