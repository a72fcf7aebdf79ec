"""The formulas of the literature, which the counts must give: 2205.05198 for activations, 1910.02054 for states."""

from __future__ import annotations

import pytest

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.activations import Shape, layer_bytes
from partita.cost.kernels import KERNELS
from partita.cost.memory import memory
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Recompute, Work
from tests.cost.published import gpt

GIB = 2**30
MEGATRON = KERNELS["megatron"]


@pytest.mark.parametrize("t", [1, 2, 4, 8])
@pytest.mark.parametrize(("h", "a"), [(6144, 64), (12288, 96), (1024, 16)])
def test_layers_keep_the_bytes_of_table_2(h: int, a: int, t: int) -> None:
    s, b = 2048, 3
    layer, model = _layer(h, a, t), ModelCost.of(spec_from_config(gpt(h, a, 2)))

    def kept(recompute: Recompute, *, parallel: bool = False) -> float:
        return layer_bytes(layer, model, Shape(b, s, s, "bfloat16", t, parallel), MEGATRON, recompute)

    sbh = s * b * h
    assert kept("none") == pytest.approx(sbh * (10 + 24 / t + 5 * a * s / (h * t)), rel=1e-12)
    assert kept("selective") == pytest.approx(sbh * (10 + 24 / t), rel=1e-12)
    assert kept("full") == 2 * sbh
    assert kept("none", parallel=True) == pytest.approx(sbh / t * (34 + 5 * a * s / h), rel=1e-12)
    assert kept("selective", parallel=True) == pytest.approx(34 * sbh / t, rel=1e-12)


def _layer(h: int, a: int, t: int):
    return ModelCost.of(spec_from_config(gpt(h, a, 2))).sliced(t).layers[0][0]


FIGURE_1 = {
    # Weights, gradients and optimizer; activations without recomputation; with sequence parallelism and selective.
    "22B": (gpt(6144, 64, 48), 1, 1, 4, 45.5625, 59.25, 9.5625),
    "175B": (gpt(12288, 96, 96), 8, 3, 64, 45.5625, 66.84375, 12.3515625),
    "530B": (gpt(20480, 128, 105), 35, 3, 280, 31.640625, 114.0234375, 23.076171875),
    "1T": (gpt(25600, 160, 128), 64, 1, 512, 32.958984375, 131.25, 26.5625),
}
"""GiB of figure 1 of 2205.05198, as github.com/calculon-ai/calculon gives them in calculon/llm/validation.py."""


@pytest.mark.parametrize("name", FIGURE_1)
def test_layers_of_a_first_stage_keep_the_bytes_of_figure_1(name: str) -> None:
    config, pp, vpp, _, _, none, selective = FIGURE_1[name]
    model = ModelCost.of(spec_from_config(config))
    layer, micro = model.sliced(8).layers[0][0], 4 if name == "22B" else 1
    in_flight = pp if vpp == 1 else pp * (1 + (pp - 1) / (pp * vpp))  # equation 5 of the paper
    count = config["n_layer"] / pp * (in_flight if pp > 1 else 1)
    for recompute, parallel, expected in (("none", False, none), ("selective", True, selective)):
        shape = Shape(micro, 2048, 2048, "bfloat16", 8, parallel)
        assert layer_bytes(layer, model, shape, MEGATRON, recompute) * count / GIB == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", FIGURE_1)
def test_schedules_keep_as_many_micro_batches_alive(name: str) -> None:
    config, pp, vpp, microbatches, states, none, _ = FIGURE_1[name]
    batch = 4 if name == "22B" else microbatches
    work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="float32")
    arrangement = Arrangement(
        mesh=Mesh(pp=pp, tp=8), layers=(config["n_layer"] // (pp * vpp),) * (pp * vpp),
        microbatches=1 if pp == 1 else microbatches, schedule="interleaved-1f1b" if vpp > 1 else "1f1b",
    )  # fmt: skip
    use = memory(ModelCost.of(spec_from_config(config)), work, arrangement, "megatron")
    # The paper counts neither the embedding's dropout nor its weights.
    assert use[0].activations / GIB == pytest.approx(none, rel=0.03)
    inner = use[8 * (pp // 2)] if pp > 2 else use[0]
    state = (inner.weights + inner.gradients + inner.optimizer) / GIB
    assert state == pytest.approx(states, rel=1e-3 if pp > 2 else 0.04)


@pytest.mark.parametrize(("zero", "bytes_of"), [
    (0, lambda p, n: 16 * p), (1, lambda p, n: 4 * p + 12 * p / n), (2, lambda p, n: 2 * p + 14 * p / n),
    (3, lambda p, n: 16 * p / n),
])  # fmt: skip
@pytest.mark.parametrize("n", [2, 8, 64])
def test_states_have_the_bytes_of_zero(zero: int, bytes_of, n: int) -> None:
    spec = spec_from_config(gpt(1024, 16, 4))
    use = memory(ModelCost.of(spec), Work(batch_size=n), Arrangement(mesh=Mesh(dp=n), zero=zero), "megatron")[0]
    states = use.weights + use.gradients + use.optimizer
    assert states == pytest.approx(bytes_of(spec.parameters, n), abs=3)
