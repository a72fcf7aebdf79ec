"""A small chat model that takes images, with its processor, and messages with pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.generation import Tokenizer, byte_tokenizer
from partita.torch.collectives.groups import single_groups
from partita.torch.new import fresh
from partita.torch.weights.save import save

PLACE = "<image>"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAVA: dict[str, Any] = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 257, "dtype": "float64",
    "text_config": {
        "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 256,
        "bos_token_id": None,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 12, "patch_size": 4, "projection_dim": 24,
    },
}  # fmt: skip


def save_llava(folder: Path) -> Path:
    """Save a randomly initialized model whose images matter, its tokenizer and its processor."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = byte_tokenizer()
    tokenizer.inner.add_tokens([PLACE], special_tokens=True)
    tokenizer.inner.chat_template = TEMPLATE
    model = fresh(LLAVA, seed=3, groups=single_groups())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    save(model, folder, tokenizer=Tokenizer(tokenizer.inner))
    pixels = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer.inner, patch_size=4, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def data_url(seed: int, size: tuple[int, int] = (20, 14)) -> str:
    """A random picture as a data URL."""
    from PIL import Image

    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about(*urls: str, text: str = "What is it?") -> list[dict[str, Any]]:
    """A chat about pictures, as OpenAI's clients write it."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*pictures, {"type": "text", "text": text}]},
    ]


def as_transformers(folder: Path, messages: list[dict[str, Any]]) -> tuple[list[int], dict[str, Tensor]]:
    """The ids and the other inputs of a chat, as transformers' own processor makes them of it."""
    from transformers import AutoProcessor
    from transformers.image_utils import load_image

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] != "image_url":
            return one
        return {"type": "image", "image": load_image(one["image_url"]["url"])}

    shown = [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [part(one) for one in m["content"]]}
        for m in messages
    ]
    made = AutoProcessor.from_pretrained(folder).apply_chat_template(
        shown, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    inputs = dict(made)
    return inputs.pop("input_ids")[0].tolist(), {k: v for k, v in inputs.items() if k != "attention_mask"}
