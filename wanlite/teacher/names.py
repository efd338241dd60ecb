"""Every name in a Wan checkpoint: folders, files, tensors in each dialect, wrappers and suffixes. Tables only.

    official                          ComfyUI, in these folders of models/ or all in one        diffusers
    high_noise_model/ + low_...       diffusion_models/*high_noise*.safetensors + *low_noise*   transformer/ + transformer_2/
    Wan2.1_VAE.pth, Wan2.2_VAE.pth    vae/wan_2.1_vae.safetensors, wan2.2_vae.safetensors       vae/
    models_t5_umt5-xxl-enc-bf16.pth   text_encoders/umt5_xxl_fp16.safetensors, fp8 as well      text_encoder/
    google/umt5-xxl/                  in the text encoder, as the tensor spiece_model           tokenizer/

Sources: Wan-Video/Wan2.2, wan/modules/model.py, vae2_1.py, vae2_2.py and t5.py; ComfyUI, comfy/text_encoders/wan.py and
comfy/sd.py; diffusers, scripts/convert_wan_to_diffusers.py.
"""

import re
from pathlib import Path

# ---- folders and files -------------------------------------------------------------------------------------

EXPERT_FOLDERS = {  # by layout: the high-noise expert's, the low-noise expert's
    "official": ("high_noise_model", "low_noise_model"),
    "diffusers": ("transformer", "transformer_2"),
}
EXPERT_PLACES = (
    "",
    "diffusion_models",
    "unet",
)  # of ComfyUI's files: all in one folder, or in models/, and deeper
COMPONENT_PLACES = (*EXPERT_PLACES, "text_encoders", "clip", "vae")
AUTOENCODERS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
TEXT_ENCODER = "models_t5_*.pth"
TOKENIZER = Path("google") / "umt5-xxl"
ONE_OF_TWO = {
    name: re.compile(  # in the name of an expert's single file, or of its folder
        # _high_ HIGH-noise t2v_hn
        rf"(?:(?<![A-Za-z])|(?<=2[Vv]))(?i:{name}(?=[-_. ]?noise|[^a-z]|$)|{name[0]}n(?=[^a-z]|$))"
        rf"|(?<![A-Z]){word}(?![a-z])|{word}[-_. ]?(?i:noise)|(?<=[A-Z]){name}[-_. ]?(?i:noise)"
    )  # wan22High T2VHighNoise
    for name, word in (("high", "High"), ("low", "Low"))
}
SHARD = re.compile(r"^diffusion_pytorch_model|-\d{5}-of-\d{5}")  # in a file name: not a single file
COMPONENT_FILES = {"text_encoder": re.compile("(?i)t5|text"), "vae": re.compile("(?i)vae")}  # of any format
NOT_AN_EXPERT = re.compile("(?i)vae|t5|clip")  # in a file name
UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")  # suffixes of downloads in progress

# ---- tensors beside the weights ----------------------------------------------------------------------------

FP8_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's: value = X.weight * X.scale
FP8_MARKS = (
    "scaled_fp8",
    "scale_input",
    "input_scale",
    "comfy_quant",
)  # for fp8 arithmetic, not in the value
SPIECE = "spiece_model"  # sentencepiece's own file, as bytes, in ComfyUI's text encoder

# ---- what wrappers add to names ----------------------------------------------------------------------------

WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_\w+|module)\.(?=.)"
)  # of DDP, FSDP and torch.compile, before and inside
FIRST, LAST = "patch_embedding.weight", ("head.head.weight", "proj_out.weight")  # of a transformer
# Two tensors that each network has: a prefix (model., model.diffusion_model., ...) is the text before both.
LANDMARKS = (
    *((FIRST, last) for last in LAST),
    ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ("token_embedding.weight", "blocks.0.attn.q.weight"),
    ("conv2.weight", "decoder.middle.0.residual.0.gamma"),
)

# ---- the transformer ---------------------------------------------------------------------------------------

# Official name -> diffusers' name. The order matters: head.modulation before modulation. norm2 and norm3 are
# swapped.
TRANSFORMER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^patch_embedding\.(weight|bias)$", r"patch_embedding.\1"),
        (r"^text_embedding\.0\.(weight|bias)$", r"condition_embedder.text_embedder.linear_1.\1"),
        (r"^text_embedding\.2\.(weight|bias)$", r"condition_embedder.text_embedder.linear_2.\1"),
        (r"^time_embedding\.0\.(weight|bias)$", r"condition_embedder.time_embedder.linear_1.\1"),
        (r"^time_embedding\.2\.(weight|bias)$", r"condition_embedder.time_embedder.linear_2.\1"),
        (r"^time_projection\.1\.(weight|bias)$", r"condition_embedder.time_proj.\1"),
        (r"^head\.modulation$", r"scale_shift_table"),
        (r"^head\.head\.(weight|bias)$", r"proj_out.\1"),
        (r"^blocks\.(\d+)\.modulation$", r"blocks.\1.scale_shift_table"),
        (r"^blocks\.(\d+)\.self_attn\.([qkv])\.(weight|bias)$", r"blocks.\1.attn1.to_\2.\3"),
        (r"^blocks\.(\d+)\.self_attn\.o\.(weight|bias)$", r"blocks.\1.attn1.to_out.0.\2"),
        (r"^blocks\.(\d+)\.cross_attn\.([qkv])\.(weight|bias)$", r"blocks.\1.attn2.to_\2.\3"),
        (r"^blocks\.(\d+)\.cross_attn\.o\.(weight|bias)$", r"blocks.\1.attn2.to_out.0.\2"),
        (r"^blocks\.(\d+)\.self_attn\.norm_([qk])\.weight$", r"blocks.\1.attn1.norm_\2.weight"),
        (r"^blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight$", r"blocks.\1.attn2.norm_\2.weight"),
        (r"^blocks\.(\d+)\.norm3\.(weight|bias)$", r"blocks.\1.norm2.\2"),
        (r"^blocks\.(\d+)\.ffn\.0\.(weight|bias)$", r"blocks.\1.ffn.net.0.proj.\2"),
        (r"^blocks\.(\d+)\.ffn\.2\.(weight|bias)$", r"blocks.\1.ffn.net.2.\2"),
    )
]
DIFFUSERS_TRANSFORMER = re.compile(
    r"^(patch_embedding|proj_out|condition_embedder\.(text|time)_embedder\.linear_[12]|condition_embedder\.time_proj"
    r"|blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|norm2|ffn\.net\.0\.proj|ffn\.net\.2))\.(weight|bias)$"
    r"|^blocks\.\d+\.attn[12]\.norm_[qk]\.weight$|^(blocks\.\d+\.)?scale_shift_table$"
)
QUANTISED = r"qweight|wscales|qzeros|quant_state|quant_map|\.absmax|smooth_factor|\.SCB|\._data|\.scales"
OTHER_NETWORKS = [  # by a tensor's name
    (re.compile(pattern), name)
    for pattern, name in (
        (r"img_emb|[kv]_img|image_embedder|add_[kv]_proj", "an image-to-video Wan"),
        (r"vace", "VACE"),
        (rf"{QUANTISED}$", "a Wan in 4 or 8 bits: fp16, bf16 and scaled fp8 are read"),
        (r"lora|lokr|hada_|\.diff(_b)?$", "a LoRA"),
        (r"audio|frame_packer|trainable_cond|cond_encoder", "a speech-to-video Wan"),
        (r"face_|motion_|pose_patch", "Wan Animate"),
        (r"control_adapter|ref_conv", "a Fun Control Wan"),
    )
]

# ---- the autoencoder and the text encoder ------------------------------------------------------------------

# Official name -> diffusers' name; every pattern that matches is applied, in this order.
AUTOENCODER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"\.conv1\.(?=weight|bias)", ".conv_in."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (
            r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.(?=resample|time_conv)",
            r".down_blocks.\1.downsampler.",
        ),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.(?=resample|time_conv)", r".up_blocks.\1.upsampler."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
]
TEXT_ENCODER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.", "encoder.block."),
        (r"\.norm1\.", ".layer.0.layer_norm."),
        (r"\.norm2\.", ".layer.1.layer_norm."),
        (r"\.attn\.([qkvo])\.", r".layer.0.SelfAttention.\1."),
        (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    )
]
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # one tensor, stored under either name or both
