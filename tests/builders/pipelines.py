"""Tiny random pipelines in diffusers' own format: the real classes, tokenizers and schedulers, few weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
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


def tiny_klein(path: str | Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a `Flux2KleinPipeline` folder: fused projections, normalised latents, Qwen3 with a chat template."""
    torch.manual_seed(seed)
    pipeline = Flux2KleinPipeline(
        vae=_tiny_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**_QWEN3, num_hidden_layers=28)).eval(),
        tokenizer=_qwen_tokenizer(),
        transformer=_tiny_flux2(joint_attention_dim=3 * _QWEN3["hidden_size"], guidance_embeds=False),
        scheduler=_flux2_scheduler(),
        is_distilled=is_distilled,
    )
    return _save(pipeline, path)


def tiny_flux2_dev(path: str | Path, seed: int = 0) -> Path:
    """Write a `Flux2Pipeline` folder: guidance as an embedding, Mistral with a system's message in the template."""
    torch.manual_seed(seed)
    text = MistralConfig(**{**_QWEN3, "num_hidden_layers": 31, "max_position_embeddings": 512})
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_qwen_tokenizer()._tokenizer,
        pad_token="<|endoftext|>",
        model_max_length=280,
        chat_template=_INSTRUCTIONS,
    )
    pipeline = Flux2Pipeline(
        vae=_tiny_flux2_vae(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=_tiny_flux2(joint_attention_dim=3 * _QWEN3["hidden_size"], guidance_embeds=True),
        scheduler=_flux2_scheduler(),
    )
    return _save(pipeline, path)


def tiny_zimage(path: str | Path, seed: int = 0, shift: float = 6.0) -> Path:
    """Write a `ZImagePipeline` folder: one stream, texts of their own lengths; 32x32."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_QWEN3["hidden_size"],
        axes_dims=[4, 4, 4],
        axes_lens=[160, 32, 32],
    )
    _fill_zero_layers(transformer)
    pipeline = ZImagePipeline(
        vae=_tiny_vae(latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**_QWEN3, num_hidden_layers=2)).eval(),
        tokenizer=_qwen_tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    return _save(pipeline, path)


_QWEN3: dict = {
    "vocab_size": 264,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
_CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

_INSTRUCTIONS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}[/{{ m.role }}]{% endfor %}"
)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """A token a byte, and Qwen's marks of a conversation; 88 tokens, of which about 20 are the template's."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: number for number, token in enumerate([*_byte_alphabet(), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=88, chat_template=_CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:3]})
    tokenizer.add_tokens(marks[3:])
    return tokenizer


def _tiny_flux2(**options) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(2, 2, 2, 2),
        **options,
    )
    _fill_zero_layers(transformer)
    return transformer.eval()


def _flux2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _tiny_flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae.eval()


def tiny_qwen_image(path: str | Path, seed: int = 0) -> Path:
    """Write a `QwenImagePipeline` folder: packed latents of a causal VAE, Qwen2.5-VL, prompts of their own lengths."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    tokenizer = qwen_tokenizer()
    pipeline = QwenImagePipeline(
        vae=tiny_causal_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen_vl_config(len(tokenizer))).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )
    return _save(pipeline, path)


def tiny_krea2(path: str | Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a `Krea2Pipeline` folder: packed latents of a causal VAE, three layers of Qwen3-VL, two heads that share a
    key."""
    torch.manual_seed(seed)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    _fill_zero_layers(transformer)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".norm" in name or "_table" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif ".to_" in name or "txt_in" in name:
                parameter.mul_(2)  # so that a picture depends on its prompt
    tokenizer = qwen_tokenizer()
    pipeline = Krea2Pipeline(
        vae=tiny_causal_vae(),
        text_encoder=Qwen3VLModel(_qwen3_vl_config(len(tokenizer))).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        text_encoder_select_layers=(0, 1, 3),
        is_distilled=is_distilled,
    )
    return _save(pipeline, path)


def tiny_causal_vae(**config) -> AutoencoderKLQwenImage:
    """Qwen-Image's VAE: of two doublings one in time too."""
    options = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [-0.7, 0.1, 0.4, -0.2],
        "latents_std": [2.8, 1.5, 0.9, 2.1],
    }
    vae = AutoencoderKLQwenImage(**(options | config)).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer over the bytes and the words of Qwen-Image's template, of which each is one token as in the
    published one; other text has a token a byte."""
    words = [*re.findall(r" ?[A-Za-z]+", QWEN_TEMPLATE), "user", "assistant"]
    merges = {}
    for word in words:
        letters = word.replace(" ", "Ġ")
        for end in range(1, len(letters)):
            merges.setdefault((letters[:end], letters[end]), None)
    tokens = [*_byte_alphabet(), *("".join(pair) for pair in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=list(merges), model_max_length=131072
    )
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


QWEN_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background"
)


def _qwen_vl_config(vocabulary: int) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": vocabulary,
            "bos_token_id": None,
            "eos_token_id": None,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )


def _qwen3_vl_config(vocabulary: int) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": vocabulary,
            "max_position_embeddings": 262144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [0],
        },
    )


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
