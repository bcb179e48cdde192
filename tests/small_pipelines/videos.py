"""Small pipelines that draw videos: a few frames, which are two or three of latents."""

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from small_pipelines.encoders import WIDTH, clip, llama, t5
from small_pipelines.entry import HEADS, LAST_TEXT, NEGATIVE, PROMPT, THIRDS, SmallPipeline, randomised

GUIDED = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0, "max_sequence_length": 16}


def cogvideox(seed: int) -> CogVideoXPipeline:
    text_encoder, tokenizer = t5(seed)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
        scaling_factor=2.0,
    )
    transformer = CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        temporal_compression_ratio=2,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=randomised(vae, seed),
        transformer=randomised(transformer, seed),
        scheduler=CogVideoXDDIMScheduler(
            clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
        ),
    )


def wan(seed: int) -> WanPipeline:
    text_encoder, tokenizer = t5(seed, multilingual=True)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0, 0.1, 0.2, 0.3],
        latents_std=[1.0, 1.1, 1.2, 1.3],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    transformer = WanTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=randomised(vae, seed),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=randomised(transformer, seed),
    )


def ltx(seed: int) -> LTXPipeline:
    text_encoder, tokenizer = t5(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
    )
    transformer = LTXVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, cross_attention_dim=64, num_layers=2, caption_channels=WIDTH
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomised(vae, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


def hunyuan_video(seed: int) -> HunyuanVideoPipeline:
    # The pipeline always fills up CLIP's prompts to its real length.
    (one, tokenizer), (two, tokenizer_2) = llama(seed), clip(seed, length=77)
    vae = AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    transformer = HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(8, 12, 12),
    )
    return HunyuanVideoPipeline(
        text_encoder=one,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
        vae=randomised(vae, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
    )


def mochi(seed: int) -> MochiPipeline:
    text_encoder, tokenizer = t5(seed)
    # The pipeline takes scales of 8 and 6 and 12 channels for granted; the norms have 32 groups whatever the widths.
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5,
        scaling_factor=8.0,
    )
    transformer = MochiTransformer3DModel(
        **THIRDS,
        num_layers=2,
        pooled_projection_dim=96,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        max_sequence_length=16,
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomised(vae, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomised(transformer, seed),
    )


VIDEOS = (
    SmallPipeline("cogvideox", cogvideox, GUIDED | {"height": 16, "width": 16, "num_frames": 5}, video=True),
    SmallPipeline("wan", wan, GUIDED | {"height": 16, "width": 16, "num_frames": 3}, video=True),
    SmallPipeline("ltx", ltx, GUIDED | {"height": 32, "width": 32, "num_frames": 3}, video=True),
    SmallPipeline(
        "hunyuan_video",
        hunyuan_video,
        {
            "prompt": PROMPT,
            "guidance_scale": 3.0,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "prompt_template": {"template": "draw {}", "crop_start": 5},
            "max_sequence_length": 16,
        },
        video=True,
    ),
    SmallPipeline(
        "mochi",
        mochi,
        GUIDED | {"height": 32, "width": 32, "num_frames": 7},
        video=True,
        fewest_steps=2,
        unseen={"transformer_blocks.1.attn1.add_q_proj": LAST_TEXT},
    ),
)
