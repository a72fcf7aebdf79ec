"""Messages between stages: any number of tensors of any form arrive as they were sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partita.errors import DistributedError
from partita.torch.collectives.comm import Communicator
from partita.torch.stages.layers import RECORDED, Message
from partita.torch.stages.links import _DTYPES, Links, _Form
from tests.support.compare import world
from tests.support.ranks import ranks

SHAPES = st.lists(st.integers(0, 2**40), max_size=6).map(tuple)
FORMS = st.builds(
    lambda arity, tensors, labels: _Form(arity, tuple(tensors), tuple(labels[: len(tensors)])),
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from(_DTYPES), SHAPES), max_size=20),
    st.lists(st.sampled_from(RECORDED), max_size=20),
)


@given(FORMS)
def test_a_form_reads_as_it_was_written(form: _Form) -> None:
    headers = iter(form.headers(torch.device("cpu")))

    def receive(numbers: int) -> list[int]:
        header = next(headers)
        assert header.shape == (numbers,)
        return header.tolist()  # type: ignore[no-any-return]

    assert _Form.received(receive) == form
    assert next(headers, None) is None


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros((1,) * 7)],
        [torch.zeros(1, dtype=torch.complex64)],
    ],
)
def test_a_form_that_no_header_holds(tensors: list[Tensor]) -> None:
    with pytest.raises(DistributedError, match=r"(?s)stages can pass on tensors of up to 6 dims.*Use pp=1"):
        _Form.of(Message(tuple(tensors)))


def links() -> Links:
    return Links(world(), torch.device("cpu"))


def values(place: int) -> list[Tensor]:
    """The tensors of message `place`, the same on both ranks."""
    generator = torch.Generator().manual_seed(place)
    return {
        0: [torch.randn(2, 3, 4, generator=generator)],
        1: [torch.randn(5, generator=generator).to(torch.bfloat16), torch.arange(6).view(2, 3), torch.ones(2) > 0],
        2: [torch.randn(1, 3, 4, generator=generator, dtype=torch.float64), torch.tensor(3)],
        3: [],
        4: [torch.randn(4, 6, generator=generator).t()],
        5: [torch.zeros(0, 4)],
    }[place]


def _all_arrive() -> list[tuple[bool, int]]:
    """Rank 0 sends each message twice, rank 1 has posted its receives before it looks at any."""
    ends, rank = links(), world().rank
    order = [place for place in range(6) for _ in range(2)]
    if rank == 0:
        for place in order:
            ends.send(1, 3, Message(tuple(values(place)), place), ("key", place))
        ends.flush()
        return []
    pending = [ends.receive(0, 4, ("key", place)) for place in order]
    found = []
    for place, one in zip(order, pending, strict=True):
        message = one.wait()
        expected = values(place)
        same = [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, message.tensors, strict=True)]
        found.append((all(same), message.arity))
    return found


def test_messages_of_every_form_arrive_in_order() -> None:
    _, found = ranks(2).run(_all_arrive)
    assert found == [(True, place) for place in range(6) for _ in range(2)]


class _Counting(Communicator):
    """Counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def start_send(self, tensor: Tensor, to: int, tag: int = 0) -> Any:
        self.sent += 1
        return super().start_send(tensor, to, tag)


def _told() -> int:
    comm = _Counting()
    ends = Links(comm, torch.device("cpu"))
    keys = ["a", "a", "b", "a", "b", "a"]
    for key in keys:
        if comm.rank == 0:
            ends.send(1, 0, Message((torch.ones(2),)), key)
        else:
            ends.receive(0, 1, key).wait()
    ends.flush()
    return comm.sent


def test_a_form_is_told_once_a_key() -> None:
    assert ranks(2).run(_told) == [6 + 2, 0]


def _there_and_back() -> list[bool]:
    """Rank 0 sends two messages, rank 1 gradients of them, in the order of a backward."""
    ends, rank = links(), world().rank
    weights = [torch.arange(6.0).view(2, 3) + i for i in range(2)]
    if rank == 0:
        for i in range(2):
            ends.send(1, 0, Message((torch.full((2, 3), float(i)), torch.ones(4) * i)), "k")
        found = []
        for i in (1, 0):
            got = ends.receive_gradient(1, 0, "k").wait().tensors
            found += [torch.equal(got[0], weights[i]), torch.equal(got[1], torch.ones(4) * i * 2)]
        ends.flush()
        return found
    received = [ends.receive(0, 1, "k") for _ in range(2)]
    leaves = [one.wait().as_leaves() for one in received]
    for i in (1, 0):
        first, second = leaves[i].tensors
        ((first * weights[i]).sum() + second.square().sum()).backward()
        gradients = [t.grad for t in leaves[i].tensors if t.grad is not None]
        # A gradient need not lie in order.
        ends.send_gradient(0, [gradients[0].t().contiguous().t(), gradients[1]])
    ends.flush()
    return []


def test_gradients_go_the_other_way() -> None:
    assert ranks(2).run(_there_and_back)[0] == [True] * 4


def _changed() -> str:
    ends = links()
    if world().rank == 1:
        return str(tuple(ends.receive(0, 1, "k").wait().tensors[0].shape))
    ends.send(1, 0, Message((torch.ones(2),)), "k")
    try:
        ends.send(1, 0, Message((torch.ones(3),)), "k")
    except DistributedError as error:
        ends.flush()
        return str(error)
    return "nothing"


def test_a_form_that_changes_under_one_key() -> None:
    said, shape = ranks(2).run(_changed)
    assert said.startswith(
        "stage 0 sends _Form(arity=0, tensors=((torch.float32, (3,)),), labels=()), but for inputs of the same shape"
    )
    assert shape == "(2,)"


def _lives_until_sent() -> float:
    """What is sent and forgotten, while others are sent, is still what was sent."""
    ends, rank = links(), world().rank
    if rank == 0:
        for i in range(20):
            ends.send(1, 0, Message((torch.full((1 << 14,), float(i)),)), "k")
        ends.flush()
        return float(len(ends._sent))
    pending = [ends.receive(0, 1, "k") for _ in range(20)]
    return max(float((one.wait().tensors[0] - i).abs().max()) for i, one in enumerate(pending))


def test_what_is_under_way_stays() -> None:
    assert ranks(2).run(_lives_until_sent) == [0.0, 0.0]
