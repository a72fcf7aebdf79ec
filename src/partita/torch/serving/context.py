"""What is not served over context parallel ranks."""

from __future__ import annotations

from torch import nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.serving import ServeSettings
from partita.torch.layers.compiled import compiled_parts
from partita.torch.proof.context import prove_generation
from partita.torch.serving.encoder import is_encoder
from partita.torch.transformers_internals import attends_by_chunks, misplaces_padding


def refuse_context(model: nn.Module, plan: Plan, settings: ServeSettings) -> None:
    """Raise `ModelError` for a model, on any device, whose requests cannot be served over the context parallel ranks of `plan`.

    A small random model of its family shows whether texts whose keys are distributed are continued as unsplit ones.
    """
    ranks = plan.mesh.cp
    if ranks == 1:
        return
    why = ""
    if settings.exact_rows:
        why = "exact_rows promises the bits of generate, but merged parts of attention are rounded in another order"
    elif is_encoder(model):
        why = "a model for embeddings continues no text, and its texts are not split over ranks"
    elif attends_by_chunks(model.config):
        why = "its layers attend within fixed chunks of a text, whose borders the padding of a batch would move"
    elif misplaces_padding(model):
        why = "it counts positions from the padding of a batch, so that requests cannot share forwards"
    elif compiled_parts(model):
        why = "compiled layers do not attend keys of other ranks"
    if why:
        raise ModelError(f"{type(model).__name__} cannot be served with cp={ranks}: {why}. Use cp=1.")
    prove_generation(model, plan)
