"""A stage of any model: the model's own forward, run with a subset of its layers.

A pipeline rank keeps the modules whose arrays its plan assigns to it. The list of layers keeps its length and indices: in
place of another rank's layer, a stand-in passes its input on. While stage i of the pipeline runs:

    [1] the embedding runs on its stage; on other stages zeros of its shape, never computed, replace it
    [2] every layer before the stage's first returns the message of the previous stage
    [3] the output of the stage's last layer ends the forward, unless the stage has the loss

So the family's own code computes everything else from ids, positions and masks on every stage. MLX is lazy: unused
results of that code are never computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan, Stage
from partita.errors import ModelError
from partita.mlx.model.cache import count_tokens
from partita.mlx.model.tree import get_module
from partita.mlx.stages.cut import Stages, call_unsplit, place_of, stages_of, swapped
from partita.mlx.stages.layers import AbsentLayer, End, Gate, Left, Message, Silent


def run_stage(
    model: nn.Module,
    plan: Plan,
    index: int,
    received: Message | None,
    inputs: mx.array,
    cache: Any = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    output: bool = True,
    part: Stage | None = None,
) -> Any:
    """Run stage `index` of the pipeline, one of this rank's stages. Nothing is evaluated.

    Args:
        model: The result of `cut_stages`.
        plan: The plan of its partition.
        index: Index of the stage in the pipeline.
        received: The message of the previous stage; None for the first.
        inputs: The ids `[batch, sequence]` that the unsplit model is called with.
        cache: The unsplit model's cache, as mlx-lm creates it; token counts of other stages' layers are advanced.
        options: Other arguments of the unsplit model.
        output: Whether the stage with the loss computes the model's output, instead of passing on its last layer's output.
        part: The part of the stage to run (see `cut.parts_of`), of which `received` is the message of the previous part;
            by default all of it.

    Returns:
        A `Message` for the next stage, or the model's own output on the stage with the loss.
    """
    given = dict(options) if cache is None else {**options, "cache": cache}
    if plan.num_stages == 1 and part is None:
        return call_unsplit(model, inputs, **given)
    stages = stages_of(model)
    stage, run = part or stages.by_index[index], stages.run
    received = None if stage.embedding else received
    if not (stage.layers or stage.embedding or (stage.loss and output)):
        if isinstance(cache, list):
            count_tokens(cache, [], length_of(inputs, options))
        return received
    run.received, run.cache, run.filled, run.called = received, cache, [], set()
    try:
        with swapped(_swaps(model, stages, stage, output)):
            made = call_unsplit(model, inputs, **given)
            if not (stage.loss and output):
                raise ModelError("its forward ends without calling each of its layers.")
    except Left as left:
        made = left.message
    finally:
        filled, run.received, run.cache, run.filled = run.filled, None, None, []
    if isinstance(cache, list):
        count_tokens(cache, filled, length_of(inputs, options))
    return made


def length_of(inputs: mx.array | None, options: Mapping[str, Any]) -> int:
    """Number of tokens per sequence of a call, which may have embeddings `[batch, sequence, hidden]` only."""
    return int((options["input_embeddings"] if inputs is None else inputs).shape[1])


def _swaps(model: nn.Module, stages: Stages, stage: Stage, output: bool) -> list[tuple[Any, Any, Any]]:
    """The replacements of modules while `stage` runs."""
    layers, run = get_module(model, stages.layers), stages.run
    swaps: list[tuple[Any, Any, Any]] = []
    for index, layer in enumerate(layers):
        if index in stage.layers:
            enters = index == stage.layers[0] == 0 and not stage.embedding
            leaves = index == stage.layers[-1] and not (stage.loss and output)
            swaps.append((layers, index, Gate(layer, run, index, enters=enters, leaves=leaves)))
        elif not stage.layers and stage.embedding:
            swaps.append((layers, index, End(layer, run)))
        elif not isinstance(layer, AbsentLayer):
            # A layer of another stage of this rank.
            swaps.append((layers, index, AbsentLayer(layer, run, index)))
    if not stage.embedding:
        swaps += [(*place_of(model, path), Silent(get_module(model, path), run)) for path in stages.before]
    return swaps
