"""Small configs of families that take images or sound: towers of other head counts than the text model's."""

from __future__ import annotations

from typing import Any

_TEXT = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {"model_type": "llama", **_TEXT}
_ODD_LLAMA = {**_LLAMA, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
_VISION = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_CLIP = {"model_type": "clip_vision_model", **_VISION, "image_size": 12, "projection_dim": 24}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3,
}  # fmt: skip
_QWEN_TOKENS = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 96, "vision_end_token_id": 97}
_DEEPSTACK = {
    **_QWEN_VISION, "depth": 3, "intermediate_size": 20, "out_hidden_size": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip


def _rotary(*sections: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **more},
    }


IMAGES: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": _LLAMA,
        "vision_config": _CLIP, "image_token_index": 99,
    },
    "llava-7-heads-1-kv": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": _ODD_LLAMA,
        "vision_config": _CLIP, "image_token_index": 99,
    },
    "llava-next": {
        "model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"], "text_config": _LLAMA,
        "vision_config": _CLIP, "image_token_index": 99, "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24]],
    },
    "gemma3": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", **_TEXT, "sliding_window": 6,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 99, "boi_token_index": 97,
        "eoi_token_index": 98,
    },
    "qwen2-vl": {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen2_vl_text", **_TEXT, **_rotary(1, 1, 2)},
        "vision_config": {"model_type": "qwen2_vl_vision", **_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
        **_QWEN_TOKENS,
    },
    "qwen2.5-vl": {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, **_rotary(1, 1, 2)},
        "vision_config": {"model_type": "qwen2_5_vl_vision", **_QWEN_VISION, "intermediate_size": 20,
                          "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    },
    "qwen3-vl": {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_vl_text", **_TEXT, **_rotary(2, 1, 1, mrope_interleaved=True)},
        "vision_config": {"model_type": "qwen3_vl_vision", **_DEEPSTACK}, **_QWEN_TOKENS,
    },
    "qwen3-vl-moe": {
        "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_vl_moe_text", **_TEXT, "moe_intermediate_size": 24, "num_experts": 4,
                        "num_experts_per_tok": 2, **_rotary(2, 1, 1)},
        "vision_config": {"model_type": "qwen3_vl_moe_vision", **_DEEPSTACK}, **_QWEN_TOKENS,
    },
    "mistral3": {
        "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_VISION, "image_size": 32, "head_dim": 8},
        "image_token_index": 99, "spatial_merge_size": 2,
    },
    "internvl": {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {"model_type": "internvl_vision", **_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": 99, "image_seq_length": 4,
    },
    "idefics3": {
        "model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"], "text_config": _LLAMA,
        "vision_config": {"model_type": "idefics3_vision", **_VISION}, "image_token_id": 99, "scale_factor": 2,
    },
    "smolvlm": {
        "model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"], "text_config": _LLAMA,
        "vision_config": {"model_type": "smolvlm_vision", **_VISION}, "image_token_id": 99, "scale_factor": 2,
    },
    "paligemma": {
        "model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"],
        "text_config": {"model_type": "gemma", **_TEXT}, "vision_config": {**_SIGLIP, "projection_dim": 32},
        "projection_dim": 32, "image_token_index": 99, "hidden_size": 32,
    },
    "aya-vision": {
        "model_type": "aya_vision", "architectures": ["AyaVisionForConditionalGeneration"],
        "text_config": {"model_type": "cohere2", **_TEXT}, "vision_config": _SIGLIP, "image_token_index": 99,
        "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6,
    },
}  # fmt: skip
"""Families that take images, by a name for the test's output."""

LLAMA4: dict[str, Any] = {
    "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
    "text_config": {"model_type": "llama4_text", **_TEXT, "intermediate_size_mlp": 40, "num_local_experts": 4,
                    "num_experts_per_tok": 1, "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
    "vision_config": {"model_type": "llama4_vision_model", **_VISION, "intermediate_size": 96, "vision_output_dim": 32,
                      "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
    "image_token_index": 99, "boi_token_index": 97, "eoi_token_index": 98,
}  # fmt: skip

_AUDIO = {"num_mel_bins": 8, "max_source_positions": 20}

SOUND: dict[str, dict[str, Any]] = {
    "qwen2-audio": {
        "model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"],
        "text_config": {"model_type": "qwen2", **_TEXT},
        "audio_config": {"model_type": "qwen2_audio_encoder", **_AUDIO, "d_model": 24, "encoder_layers": 2,
                         "encoder_attention_heads": 3, "encoder_ffn_dim": 20},
        "audio_token_index": 99,
    },
    "voxtral": {
        "model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"], "text_config": _LLAMA,
        "audio_config": {"model_type": "voxtral_encoder", **_AUDIO, "hidden_size": 24, "intermediate_size": 96,
                         "num_hidden_layers": 2, "num_attention_heads": 3},
        "audio_token_id": 99,
    },
    "granite-speech": {
        "model_type": "granite_speech", "architectures": ["GraniteSpeechForConditionalGeneration"],
        "text_config": {"model_type": "granite", **_TEXT},
        "encoder_config": {"model_type": "granite_speech_encoder", "input_dim": 8, "num_layers": 2, "hidden_dim": 24,
                           "feedforward_mult": 2, "num_heads": 3, "dim_head": 8, "output_dim": 10, "context_size": 20,
                           "max_pos_emb": 32},
        "projector_config": {"model_type": "blip_2_qformer", "hidden_size": 24, "num_hidden_layers": 2,
                             "num_attention_heads": 3, "intermediate_size": 20, "encoder_hidden_size": 24},
        "audio_token_index": 99, "has_lora_adapter": False, "window_size": 10, "downsample_rate": 5,
    },
}  # fmt: skip
"""Families that take sound."""
