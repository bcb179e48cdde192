"""Small pipelines that draw images."""

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from small_pipelines.encoders import WIDTH, bert, clip, gemma, mistral, qwen3, qwen_vl, t5
from small_pipelines.entry import HEADS, LAST_TEXT, NEGATIVE, PROMPT, SmallPipeline, randomised

GUIDED = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0}

# A clipped estimate hides what a layer changed, and steps that start from little noise hardly ask the transformer.
UNCLIPPED = {"clip_sample": False, "timestep_spacing": "trailing"}


def autoencoder(seed: int, channels: int = 4, levels: int = 2, **config) -> AutoencoderKL:
    """An image's VAE that scales by 2^(levels - 1)."""
    return randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8,) * levels,
            latent_channels=channels,
            norm_num_groups=4,
            **{"scaling_factor": 1.0, "shift_factor": 0.1} | config,
        ),
        seed,
    )


def dit(seed: int) -> DiTPipeline:
    transformer = DiTTransformer2DModel(**HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8)
    return DiTPipeline(
        transformer=randomised(transformer, seed),
        vae=autoencoder(seed),
        scheduler=DDIMScheduler(**UNCLIPPED),
        id2label={0: "fox", 1: "owl, bird"},
    )


def pixart_sigma(seed: int) -> PixArtSigmaPipeline:
    text_encoder, tokenizer = t5(seed)
    transformer = PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=WIDTH,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(seed),
        transformer=randomised(transformer, seed),
        scheduler=DPMSolverMultistepScheduler(),
    )


def stable_diffusion_3(seed: int) -> StableDiffusion3Pipeline:
    (one, tokenizer), (two, tokenizer_2) = clip(seed, projection=True), clip(seed + 1, projection=True)
    # CLIP's two states stand side by side; the pipeline fills them up to the width of T5's.
    three, tokenizer_3 = t5(seed, width=2 * WIDTH)
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(seed),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        text_encoder_3=three,
        tokenizer_3=tokenizer_3,
    )


def flux(seed: int) -> FluxPipeline:
    (one, tokenizer), (two, tokenizer_2) = clip(seed), t5(seed)
    transformer = FluxTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(seed),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        transformer=randomised(transformer, seed),
    )


def flux2(seed: int) -> Flux2Pipeline:
    text_encoder, tokenizer = mistral(seed)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    transformer = Flux2Transformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=2 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomised(vae, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


def sana(seed: int) -> SanaPipeline:
    text_encoder, tokenizer = gemma(seed)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    transformer = SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=WIDTH,
        sample_size=8,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=randomised(vae, seed),
        transformer=randomised(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def hunyuan_dit(seed: int) -> HunyuanDiTPipeline:
    (one, tokenizer), (two, tokenizer_2) = bert(seed), t5(seed, length=256)
    transformer = HunyuanDiT2DModel(
        **HEADS,
        hidden_size=64,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=4,  # the first whose skip connection has a layer
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        mlp_ratio=2.0,
    )
    return HunyuanDiTPipeline(
        vae=autoencoder(seed),
        text_encoder=one,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
        scheduler=DDIMScheduler(**UNCLIPPED, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
    )


def qwen_image(seed: int) -> QwenImagePipeline:
    text_encoder, tokenizer = qwen_vl(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0, 0.1, 0.2, 0.3],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    )
    transformer = QwenImageTransformer2DModel(
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomised(vae, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


def lumina2(seed: int) -> Lumina2Pipeline:
    text_encoder, tokenizer = gemma(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=randomised(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(seed, levels=4),  # the pipeline takes a scale of 8 for granted
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def aura_flow(seed: int) -> AuraFlowPipeline:
    text_encoder, tokenizer = t5(seed, multilingual=True)
    transformer = AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=64,
        pos_embed_max_size=16,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(seed),
        transformer=randomised(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def chroma(seed: int) -> ChromaPipeline:
    text_encoder, tokenizer = t5(seed)
    transformer = ChromaTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
        approximator_hidden_dim=64,
        approximator_layers=2,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


def z_image(seed: int) -> ZImagePipeline:
    text_encoder, tokenizer = qwen3(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,  # the MLP is 8/3 as wide: whole groups of 32
        n_layers=2,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


SMALL = {"height": 16, "width": 16}

IMAGES = (
    SmallPipeline("dit", dit, {"class_labels": [1]}, adapters=False, only_pixels=True),
    SmallPipeline(
        "pixart_sigma",
        pixart_sigma,
        GUIDED | SMALL | {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
        adapters=False,
    ),
    SmallPipeline(
        "stable_diffusion_3",
        stable_diffusion_3,
        GUIDED | SMALL | {"max_sequence_length": 16},
        unseen={"transformer_blocks.1.attn.add_q_proj": LAST_TEXT},
    ),
    SmallPipeline("flux", flux, SMALL | {"prompt": PROMPT, "guidance_scale": 3.0, "max_sequence_length": 16}),
    SmallPipeline(
        "flux2",
        flux2,
        SMALL | {"prompt": PROMPT, "guidance_scale": 3.0, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2)},
    ),
    SmallPipeline(
        "sana",
        sana,
        GUIDED
        | {
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    SmallPipeline("hunyuan_dit", hunyuan_dit, GUIDED | SMALL | {"use_resolution_binning": False}, adapters=False),
    SmallPipeline(
        "qwen_image",
        qwen_image,
        SMALL | {"prompt": PROMPT, "negative_prompt": NEGATIVE, "true_cfg_scale": 3.0},
        unseen=dict.fromkeys(
            (
                "transformer_blocks.1.attn.add_q_proj",
                "transformer_blocks.1.attn.to_add_out",
                "transformer_blocks.1.txt_mlp.net.0.proj",
                "transformer_blocks.1.txt_mlp.net.2",
            ),
            LAST_TEXT,
        ),
    ),
    SmallPipeline(
        "lumina2",
        lumina2,
        GUIDED | {"height": 64, "width": 64, "system_prompt": "draw", "max_sequence_length": 32},
    ),
    SmallPipeline("aura_flow", aura_flow, GUIDED | SMALL | {"max_sequence_length": 16}),
    SmallPipeline("chroma", chroma, GUIDED | SMALL | {"max_sequence_length": 16}),
    SmallPipeline("z_image", z_image, GUIDED | SMALL | {"max_sequence_length": 48}),
)
