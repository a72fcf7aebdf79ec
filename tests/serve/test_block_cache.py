"""The blocks of a text are truncated and copied, and both texts continue as each would alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from partita.serving import ServeSettings
from partita.serving.blocks import BlockPool, Held
from partita.torch.model.modes import mode_set
from partita.torch.serving.adapters import ServedAdapters
from partita.torch.serving.forwards import BlockForward, Through
from partita.torch.serving.measure import measure
from tests.support.serving import split_model, unsplit_model

SIZE = 4
TEXT = [7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 1]


@pytest.mark.parametrize("kept", [4, 6, *(pytest.param(kept, marks=pytest.mark.slow) for kept in (3, 8, 10))])
def test_a_truncated_text_and_its_copy_continue_as_alone(kept: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unsplit = unsplit_model("gemma3_text", {"sliding_window": 5}, torch.float64)
        model = split_model(unsplit, {})
        stages = Through(model)
        with mode_set(model, training=False), torch.inference_mode():
            measured = measure(
                model, stages, ServeSettings(block_tokens=SIZE, cache_bytes=1 << 20), ServedAdapters(model, {})
            )
            assert measured.pools is not None
            pool = BlockPool(measured.layout, keeps_prefixes=True)

            def logits(held: list[int], ids: list[int], start: int) -> Tensor:
                slots = (torch.tensor(held)[:, None] * SIZE + torch.arange(SIZE)).view(-1)
                found: list[Tensor] = []
                forward = BlockForward(model, measured.pools, [ids], [(slots, start)])  # type: ignore[arg-type]
                stages.run([forward], lambda output, _: found.append(output.logits[:, -1].clone()))
                return found[0]

            def copied(held: Held | None) -> list[int]:
                assert held is not None
                assert measured.pools is not None
                if held.copied is not None:
                    measured.pools.copy(*held.copied, SIZE)
                return held.blocks

            first = pool.take(4) or []
            logits(first, TEXT, 0)
            pool.keep(TEXT, first)
            second = copied(pool.copy(first, kept, 4))
            first = copied(pool.truncate(first, kept))
            first += pool.take(4 - len(first)) or []
            for held, more in ((first, [11, 12, 13]), (second, [21, 22, 23]), (first, [14]), (second, [24])):
                ids = [*TEXT[:kept], *more] if len(more) == 3 else [*TEXT[:kept], *(more[0] - 3 + i for i in range(4))]
                start = len(ids) - len(more)
                alone = unsplit(torch.tensor([ids])).logits[:, -1]
                assert torch.allclose(logits(held, more, start), alone, rtol=1e-10, atol=1e-10)
            # A block that is given back keeps its text; one that was written over does not.
            assert len(pool.match([*TEXT, 1])) == (2 if kept % SIZE == 0 else kept // SIZE)
