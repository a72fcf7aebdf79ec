"""A speech encoder and decoder was refused over tp with the AttributeError of a forward that got text for sound."""

from __future__ import annotations

import pytest

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import plan_of_model

WHISPER = {
    "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": 101, "d_model": 24,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def test_the_reason_names_what_the_model_takes() -> None:
    model = build_on_meta(read_hf_config(WHISPER))
    with pytest.raises(ModelError, match="WhisperForConditionalGeneration takes input_features instead of text"):
        plan_of_model(model, Mesh(tp=2))
