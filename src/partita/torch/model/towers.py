"""Vision and audio towers of a model: their paths, the arguments that feed them, and sample images and sound to test them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from partita.errors import ModelError
from partita.torch.transformers_internals import text_config_of


class Medium(NamedTuple):
    """How transformers models accept one kind of media.

    Attributes:
        name: `image`, `video` or `audio`.
        features: The model's method that computes its features.
        pixels: Names of the argument that holds it, the most common first.
        grid: The argument with each item's size in patches, for models that take concatenated patches.
        type_id: The value of `mm_token_type_ids` at its tokens.
    """

    name: str
    features: str
    pixels: tuple[str, ...]
    grid: str
    type_id: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """Keys of a config that may hold the id of its placeholder token."""
        return f"{self.name}_token_id", f"{self.name}_token_index"


MEDIA = (
    Medium("image", "get_image_features", ("pixel_values", "image_pixel_values"), "image_grid_thw", 1),
    Medium("video", "get_video_features", ("pixel_values_videos",), "video_grid_thw", 2),
    Medium("audio", "get_audio_features", ("input_features", "audio_input_features"), "", 3),
)

IMAGES_BY_ROW = (2, 1, 0)
"""How many images, videos or recordings each row of a sample has."""


def tower_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules and tensors that turn images and sound into features for the text model; empty for a text-only
    model.

    Whatever is not the text model, its head, or a module that holds these is a tower, its projector or one of its tensors.
    Inside the text model, a module is a tower if it declares that it takes no text.
    """
    config: Any = getattr(model, "config", None)
    modalities = _modalities(model)
    if not modalities > {"text"} or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return ()
    text = [
        m
        for m in (_asked(model, "decoder"), _asked(model, "input_embeddings"), _asked(model, "output_embeddings"))
        if m is not None
    ]
    return tuple(_outside(model, "", text))


def _outside(module: nn.Module, path: str, text: list[nn.Module]) -> Iterator[str]:
    if any(module is part for part in text):
        yield from _inside(module, path)
        return
    inside = {id(m) for m in module.modules()}
    if not any(id(part) in inside for part in text):
        if any(True for _ in module.state_dict(keep_vars=True)):
            yield path
        return
    prefix = f"{path}." if path else ""
    yield from (prefix + name for name in module._parameters if module._parameters[name] is not None)
    for name, child in module.named_children():
        yield from _outside(child, prefix + name, text)


def _inside(text: nn.Module, path: str) -> Iterator[str]:
    found: list[str] = []
    for name, module in text.named_modules(prefix=path):
        within = any(name.startswith(f"{tower}.") for tower in found)
        if (
            module is not text
            and not within
            and hasattr(module, "input_modalities")
            and "text" not in _modalities(module)
        ):
            found.append(name)
    yield from found


def _modalities(module: nn.Module) -> set[str]:
    said: Any = getattr(module, "input_modalities", "text")
    return {said} if isinstance(said, str) else set(said)


def _asked(model: nn.Module, part: str) -> nn.Module | None:
    try:
        return getattr(model, f"get_{part}")()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def media_of(model: nn.Module) -> tuple[Medium, ...]:
    """The kinds of media that a model's forward accepts."""
    takes = inspect.signature(type(model).forward).parameters
    return tuple(medium for medium in MEDIA if any(name in takes for name in medium.pixels))


def forbid_media(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Make a model raise when it is called with kinds of media for which its split could not be verified.

    Args:
        model: The unsplit model, before it is split.
        reasons: Maps the kind's name to the reason.
    """
    for medium in MEDIA:
        if medium.name in reasons and medium.name not in forbidden_media(model):
            model.partita_forbidden_media = {**forbidden_media(model), medium.name: reasons[medium.name]}  # type: ignore[assignment]
    if forbidden_media(model) and _refuse_media not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_media, with_kwargs=True)


def forbidden_media(model: nn.Module) -> Mapping[str, str]:
    """The reasons passed to `forbid_media`."""
    return getattr(model, "partita_forbidden_media", {})


def _refuse_media(model: nn.Module, args: object, kwargs: Mapping[str, Any]) -> None:
    refuse_forbidden(model, kwargs)


def refuse_forbidden(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise `ModelError` if `inputs` hold media for which the split of `model` could not be verified."""
    ready = inputs.get("mm_encoder_outputs") or {}
    for medium in MEDIA:
        reason = forbidden_media(model).get(medium.name)
        given = ready.get(medium.name) is not None or any(inputs.get(name) is not None for name in medium.pixels)
        if reason is not None and given:
            raise ModelError(
                f"the split {type(model).__name__} could not be verified to match the unsplit model on {medium.name} inputs: "
                f"{reason} Text "
                "inputs could. Use one rank for {medium.name} inputs."
            )


def give_no_features(model: nn.Module) -> None:
    """Make a model whose towers are on another stage return no features: transformers' `generate` asks before it begins."""
    for module in model.modules():
        for medium in MEDIA:
            method = getattr(module, medium.features, None)
            if method is not None:
                setattr(module, medium.features, _none_like(method))


def _none_like(method: Any) -> Any:
    @functools.wraps(method)
    def none(*args: object, **kwargs: object) -> None:
        return None

    return none


_FEEDS_A_TOWER = re.compile(r"pixel_values|input_features$|^mm_encoder_outputs$")


def without_media(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model without those that feed towers, for a stage that has none.

    Token sizes and token types stay: positions and masks are computed from them.
    """
    return {name: value for name, value in inputs.items() if not _FEEDS_A_TOWER.search(name)}


def sample_media(model: nn.Module, medium: Medium, by_row: tuple[int, ...] = IMAGES_BY_ROW) -> dict[str, Tensor]:
    """Inputs of a model for rows of text with `by_row` images each, of different sizes where the model allows it.

    The number of tokens of an image comes from the features that the model itself computes.

    Raises:
        ModelError: The model accepts none of the known forms of images.
    """
    config: Any = model.config
    token = next((t for key in medium.tokens if type(t := getattr(config, key, None)) is int), None)
    if token is None:
        raise ModelError(f"{type(model).__name__} does not define a placeholder token for {medium.name} features.")
    if not any(by_row):
        return _text_around(model, medium, token, [[] for _ in by_row])
    reasons = []
    for form in _forms(model, medium, by_row):
        try:
            for runs in _possible_runs(model, medium, form, by_row):
                inputs = {**_text_around(model, medium, token, runs), **form}
                with contextlib.suppress(*_WRONG_COUNT), torch.no_grad():
                    model(**inputs)
                    return inputs
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    raise ModelError(
        f"the model accepts none of the {medium.name} inputs tried ({reasons[0] if reasons else 'of no known form'})."
    )


def _forms(model: nn.Module, medium: Medium, by_row: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """Forms in which a model may accept images, `by_row` in each row, the most likely first."""
    config: Any = model.config
    takes = _takes(type(model).forward)
    name = next(name for name in medium.pixels if name in takes)
    if medium.name == "audio":
        yield from _audio_forms(model, name, sum(by_row))
        return
    vision = getattr(config, "vision_config", config)
    side, patch, channels = _side(vision, "image_size"), _side(vision, "patch_size"), _channels(vision)
    number, rows = sum(by_row), len(by_row)
    if medium.grid in takes:
        merge = int(getattr(vision, "spatial_merge_size", 1))
        grids = torch.tensor([(1, merge * (1 + i % 2), merge * (3 - i)) for i in range(number)])
        width = channels * int(getattr(vision, "temporal_patch_size", 1)) * patch**2
        yield {name: _noise(int(grids.prod(1).sum()), width), medium.grid: grids}
        return
    if "image_sizes" in takes:
        odd = torch.tensor([(side - 1 - i, side // 2 + 1 + i) for i in range(number)])
        merged = patch * int(getattr(config, "spatial_merge_size", 1))
        whole = torch.tensor([(merged * (1 + i % 2), 2 * merged) for i in range(number)])
        if pinpoints := getattr(config, "image_grid_pinpoints", None):
            tiles = 1 + max(height * width for height, width in pinpoints) // side**2
            yield {name: _noise(number, tiles, channels, side, side), "image_sizes": odd}
        yield {name: _noise(number, channels, *whole.amax(0).tolist()), "image_sizes": whole}
    if "pixel_attention_mask" in takes:
        pixels = _noise(rows, max(by_row), channels, side, side)
        mask = torch.ones(rows, max(by_row), side, side, dtype=torch.bool)
        for row, images in enumerate(by_row):
            # Models treat an image of zeros as padding.
            pixels[row, images:] = 0
            mask[row, :, :, side - patch * row :] = row == 0
        yield {name: pixels, "pixel_attention_mask": mask}
    yield {name: _noise(number, channels, side, side)}


def _audio_forms(model: nn.Module, name: str, number: int) -> Iterator[dict[str, Tensor]]:
    config: Any = model.config
    audio = next(
        (c for key in ("audio_config", "encoder_config") if (c := getattr(config, key, None)) is not None), config
    )
    width = next(
        (w for key in ("num_mel_bins", "input_dim", "input_feat_size", "input_size") if (w := getattr(audio, key, 0))),
        0,
    )
    frames = 2 * int(getattr(audio, "max_source_positions", 0) or 0)
    takes = _takes(type(model).forward)
    masks = [m for m in ("input_features_mask", "feature_attention_mask") if m in takes]
    if frames:
        yield {name: _noise(number, width, frames), **{m: torch.ones(number, frames, dtype=torch.long) for m in masks}}
    frames = 40
    lengths = torch.tensor([frames - 8 * i for i in range(number)])
    mask = torch.arange(frames) < lengths[:, None]
    yield {name: _noise(number, frames, width), **dict.fromkeys(masks, mask)}
    if masks:
        yield {name: _noise(number, frames, width)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _side(vision: Any, key: str) -> int:
    value = getattr(vision, key, 0) or 0
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _channels(vision: Any) -> int:
    return next((int(n) for key in ("num_channels", "in_channels", "in_chans") if (n := getattr(vision, key, 0))), 3)


def _takes(function: Any) -> Mapping[str, Any]:
    return inspect.signature(function).parameters


_WRONG_COUNT = (ValueError, RuntimeError, IndexError)
"""What models raise when images and placeholder tokens do not match."""

_MOST_TOKENS = 40
"""Largest number of tokens per image to try in a model that does not define it."""


def _possible_runs(
    model: nn.Module, medium: Medium, form: Mapping[str, Tensor], by_row: tuple[int, ...]
) -> Iterator[list[list[int]]]:
    """How many tokens each image of each row takes: as the model defines it, or else every number in turn."""
    for module in model.modules():
        method = getattr(module, medium.features, None)
        if method is not None and any(name in _takes(method) for name in medium.pixels):
            with torch.no_grad():
                yield _runs_of(method(**{k: v for k, v in form.items() if k in _takes(method)}), by_row)
            return
    # Older processors used a single token for all features of a recording.
    yield from ([[count] * images for images in by_row] for count in range(2, _MOST_TOKENS))


def _runs_of(features: Any, by_row: tuple[int, ...]) -> list[list[int]]:
    """How many features each image of each row has."""
    found = getattr(features, "pooler_output", None)
    found = getattr(features, "last_hidden_state", features) if found is None else found
    found = found[0] if isinstance(found, tuple) and len(found) == 1 else found
    if isinstance(found, Tensor):
        found = list(found) if found.dim() > 2 else list(found.chunk(sum(by_row)))
    counts = [part.numel() // part.shape[-1] for part in found]
    if len(counts) == len(by_row) and counts[-1] == by_row[-1] == 0:
        # A model may return all features of a row in one tensor.
        return [[count // images] * images if images else [] for images, count in zip(by_row, counts, strict=True)]
    each = iter(counts)
    return [[next(each) for _ in range(images)] for images in by_row]


def _text_around(model: nn.Module, medium: Medium, token: int, runs: list[list[int]]) -> dict[str, Tensor]:
    """Random ids with `runs` of placeholder tokens in each row, one an image; the end is padding."""
    config: Any = model.config
    vocabulary = int(text_config_of(config).vocab_size)
    special = {value for key, value in vars(config).items() if re.search(r"_token_(id|index)$", key)}
    usable = torch.tensor([i for i in range(3, vocabulary) if i not in special])
    generator = torch.Generator().manual_seed(0)

    def sample_ids(count: int) -> list[int]:
        return usable[torch.randint(0, len(usable), (count,), generator=generator)].tolist()

    rows = []
    for row, lengths in enumerate(runs):
        ids = sample_ids(2 + row)
        for length in lengths:
            ids += [token] * length + sample_ids(3)
        rows.append(ids)
    longest = max(len(row) for row in rows) + 1
    padded = torch.tensor([row + sample_ids(longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    inputs = {"input_ids": padded, "attention_mask": mask}
    here = torch.eq(padded, token).long()
    takes = _takes(type(model).forward)
    if "mm_token_type_ids" in takes:
        inputs["mm_token_type_ids"] = here * medium.type_id
    if "token_type_ids" in takes:
        inputs["token_type_ids"] = here
    return inputs
