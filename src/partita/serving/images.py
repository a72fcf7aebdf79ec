"""Images in messages: read from data URLs, and made into a prompt by the processor that comes with the model."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partita.dependencies import reading_code
from partita.errors import CheckpointError, PlanError
from partita.serving.requests import Input

MOST_PIXELS = 1 << 26
"""The largest number of pixels of an image, so that a small file cannot fill the memory."""


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The URLs of the images of messages, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["url"] for part in parts if part["type"] == "image"]


def read_image(url: str) -> Any:
    """The image in a data URL, as an RGB image of Pillow.

    Raises:
        PlanError: It is another kind of URL, or holds no image.
    """
    head, comma, data = url.partition(",")
    if not head[:5].lower() == "data:":
        raise PlanError(
            f"this server fetches nothing from other hosts, so an image must be a data URL (data:image/png;base64,...); got "
            f"{url[:60]!r}."
        )
    if not comma or not head.lower().endswith(";base64"):
        raise PlanError(f"the data URL of an image must be in base64 (data:image/png;base64,...); got {head[:60]!r}.")
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        width, height = image.size
        if width * height <= MOST_PIXELS:
            return image.convert("RGB")
    except (OSError, ValueError, binascii.Error, SyntaxError, Image.DecompressionBombError) as error:
        raise PlanError(f"the image cannot be read: {' '.join(str(error).split())[:200]}.") from error
    raise PlanError(
        f"an image has at most {MOST_PIXELS} pixels here, but this one has {width} x {height}. Make it smaller."
    )


class ImageProcessor:
    """The processor of a model that takes images, which is loaded when the first image arrives."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """Use the processor in `folder`."""
        self._folder, self._trusted = folder, trust_remote_code
        self._inner: Any = None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        settings: Mapping[str, Any],
    ) -> tuple[list[int], tuple[Input, ...]]:
        """The ids of a chat with images, and what the model takes beside them.

        Args:
            messages: The messages, whose contents are lists of parts: `text` with a text, `image` with a data URL.
            tools: The functions that the model may call.
            add_generation_prompt: Whether the ids end where the next answer begins.
            settings: Variables for the chat template.

        Raises:
            PlanError: An image cannot be read.
            CheckpointError: The model comes without a processor, or it does not take these messages.
        """
        import numpy as np

        pictures = [read_image(url) for url in images_of(messages)]
        shown = [
            {**message, "content": [{k: v for k, v in part.items() if k != "url"} for part in message["content"]]}
            for message in messages
        ]
        processor = self._loaded()
        try:
            text = processor.apply_chat_template(
                shown, tools=list(tools) if tools else None, add_generation_prompt=add_generation_prompt, tokenize=False,
                **settings,
            )  # fmt: skip
            bos = processor.tokenizer.bos_token
            special = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
            made = dict(processor(text=[text], images=pictures, return_tensors="np", **special))
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"the model's processor does not take these messages: {why[:300]}") from error
        ids = [int(i) for i in np.asarray(made.pop("input_ids"))[0]]
        made.pop("attention_mask", None)
        return ids, tuple(_input(name, np.asarray(value)) for name, value in made.items())

    def _loaded(self) -> Any:
        if self._inner is None:
            from transformers import AutoProcessor

            try:
                with reading_code(trusted=self._trusted):
                    found = AutoProcessor.from_pretrained(self._folder, trust_remote_code=self._trusted)
            except Exception as error:
                why = " ".join(str(error).split()) or type(error).__name__
                raise CheckpointError(f"the processor of the model's images cannot be read: {why[:300]}") from error
            if not hasattr(found, "image_processor"):
                raise CheckpointError("the model's files have no processor of images (preprocessor_config.json).")
            self._inner = found
        return self._inner


def _input(name: str, value: Any) -> Input:
    if value.dtype.kind not in "fiub":
        raise CheckpointError(
            f"the model's processor returns {name} of dtype {value.dtype}, which is no array of numbers."
        )
    return Input(name, value.dtype.name, tuple(map(int, value.shape)), value.tobytes())
