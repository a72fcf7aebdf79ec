"""Calls of `partita.torch` and `partita.mlx`: what they are given, and the error. One rank, so that each takes a moment."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import partita.torch as pt
from partita import Mesh, Plan, spec_from_config
from partita.generation import Sampling
from partita.torch.collectives.comm import Communicator
from partita.training import TrainSettings
from tests.bad_input.models import LLAMA
from tests.bad_input.table import ENGINES, Call, holds, raises, rows

x = torch.zeros(2, 4)
single = Communicator.single()
deeper = Plan.make(spec_from_config({**LLAMA, "num_hidden_layers": 3}), Mesh())
NOT_OURS = "this model was not split by Partita. Use partita."


@pytest.fixture
def _parallel() -> Iterator[None]:
    pt.init_parallelism()
    yield
    pt.reset_parallelism()


LAYERS = [
    Call(
        "column: no inputs",
        lambda: pt.ColumnParallelLinear(0, 4),
        "in_features must be a whole number of at least 1, but is 0.",
    ),
    Call(
        "column: no outputs",
        lambda: pt.ColumnParallelLinear(4, 0),
        "out_features must be a whole number of at least 1, but is 0.",
    ),
    Call("column: outputs below zero", lambda: pt.ColumnParallelLinear(4, -4), "out_features must be...but is -4."),
    Call("column: inputs as a fraction", lambda: pt.ColumnParallelLinear(4.0, 4), "in_features must be...but is 4.0."),
    Call(
        "column: init_type",
        lambda: pt.ColumnParallelLinear(4, 4, init_type="glorot"),
        "init_type must be one of orthogonal...'glorot'.",
    ),
    Call(
        "column: stride",
        lambda: pt.ColumnParallelLinear(4, 4, stride=3),
        "stride must divide the split dimension (4); got 3.",
    ),
    Call("column: lora_rank", lambda: pt.ColumnParallelLinear(4, 4, lora_rank=0), "the rank of LoRA must be...got 0."),
    Call(
        "column: gathered and parallel",
        lambda: pt.ColumnParallelLinear(4, 4, gather_output=True, sequence_parallel=True),
        "gather_output=True and sequence_parallel=True exclude each other",
    ),
    Call(
        "row: no inputs",
        lambda: pt.RowParallelLinear(0, 4),
        "in_features must be a whole number of at least 1, but is 0.",
    ),
    Call("row: outputs below zero", lambda: pt.RowParallelLinear(4, -1), "out_features must be...but is -1."),
    Call(
        "row: init_type",
        lambda: pt.RowParallelLinear(4, 4, init_type=""),
        "init_type must be one of orthogonal...got ''.",
    ),
    Call(
        "row: stride",
        lambda: pt.RowParallelLinear(4, 4, stride=0),
        "stride must divide the split dimension (4); got 0.",
    ),
    Call("row: lora_rank", lambda: pt.RowParallelLinear(4, 4, lora_rank="x"), "the rank of LoRA must be...got 'x'."),
    Call("embedding: no rows", lambda: pt.ParallelEmbedding(0, 4), "num_embeddings must be...but is 0."),
    Call("embedding: width below zero", lambda: pt.ParallelEmbedding(4, -1), "embedding_dim must be...but is -1."),
    Call(
        "embedding: padding",
        lambda: pt.ParallelEmbedding(4, 4, padding_idx=4),
        "padding_idx must be in [-4, 4); got 4.",
    ),
    Call(
        "embedding: norm",
        lambda: pt.ParallelEmbedding(4, 4, norm_type=0),
        "norm_type must be a positive number; got 0.",
    ),
    Call(
        "embedding: init_type",
        lambda: pt.ParallelEmbedding(4, 4, init_type="x"),
        "init_type must be one of...got 'x'.",
    ),
    Call("LoRA: rank", lambda: pt.LoraLinear(nn.Linear(4, 4), -1), "the rank of LoRA must be...got -1."),
]

fill = pt.initialize_model_parallel_affine_weight_
MAPPINGS = [
    Call("fill: size of a part", lambda: fill(x, 4, 4, 3, 0), "per_partition_size must be 4 on rank 0 of 1; got 3."),
    Call("fill: dim", lambda: fill(x, 2, 4, 2, 2), "partition_dim must be 0 or 1; got 2."),
    Call("fill: init_type", lambda: fill(x, 2, 4, 2, 0, "x"), "init_type must be one of...got 'x'."),
    Call("fill: shape", lambda: fill(x, 4, 4, 4, 0), "weight must be (4, 4) on rank 0 of 1; got (2, 4)."),
    Call("fill: rank", lambda: fill(x, 4, 4, 2, 0, rank=3, world_size=2), "rank must be in [0, 2), but is 3."),
    Call("mp_scatter: dim", lambda: pt.mp_scatter(x, 2), "dim must be in [-2, 2) for x of shape (2, 4); got 2."),
    Call(
        "mp_scatter: sizes",
        lambda: pt.mp_scatter(x, 0, sizes=[3]),
        "sizes must be 1 numbers that add up to 2 (dim 0), but are (3,).",
    ),
    Call("mp_gather: dim", lambda: pt.mp_gather(x, -3), "dim must be in [-2, 2) for x of shape (2, 4); got -3."),
    Call("mp_gather: sizes", lambda: pt.mp_gather(x, 0, sizes=[1, 1]), "sizes must be 1 numbers...but are (1, 1)."),
    Call("mp_copy: op", lambda: pt.mp_copy(x, dist.ReduceOp.PRODUCT), "op must be SUM, AVG, MAX or MIN"),
    Call(
        "mp_reduce: op",
        lambda: pt.mp_reduce(x, "sum"),
        "op must be SUM, AVG, MAX or MIN, whose gradients are defined; got sum.",
    ),
    Call(
        "loss: target",
        lambda: pt.vocab_parallel_cross_entropy(x, torch.tensor([5, 1]), single),
        "target 5 is outside the vocabulary of 4",
    ),
    Call(
        "loss: shape",
        lambda: pt.vocab_parallel_cross_entropy(x, torch.tensor([1]), single),
        "logits must be (1, 4) on rank 0; got (2, 4).",
    ),
    Call(
        "parallelism: twice",
        lambda: pt.init_parallelism(),
        "parallelism is initialized already. Call reset_parallelism() first",
    ),
]


@pytest.mark.usefixtures("_parallel")
@rows([*LAYERS, *MAPPINGS])
def test_layers_of_torch(case: Call) -> None:
    raises(case)


@rows(
    [
        Call(
            "not initialized",
            lambda: pt.ColumnParallelLinear(4, 4),
            "parallelism is not initialized. Call partita.torch.init_parallelism()",
        ),
        Call("no ranks", lambda: pt.init_parallelism(0), "tp must be a whole number of at least 1, but is 0."),
        Call(
            "more than the run has",
            lambda: pt.init_parallelism(2),
            "not a multiple of model_parallelism (2) x pipeline_parallelism (1) = 2.",
        ),
    ]
)
def test_parallelism(case: Call) -> None:
    raises(case)


def test_layers_of_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    import mlx.nn as mnn

    import partita.mlx as pm

    quantized, plain = pm.QuantizedAllToShardedLinear, mnn.Linear(4, 4)
    table = [
        Call(
            "no inputs",
            lambda: pm.AllToShardedLinear(0, 4),
            "input_dims must be a whole number of at least 1, but is 0.",
        ),
        Call(
            "no outputs",
            lambda: pm.ShardedToAllLinear(4, 0),
            "output_dims must be a whole number of at least 1, but is 0.",
        ),
        Call("inputs below zero", lambda: pm.ShardedToAllLinear(-4, 4), "input_dims must be...but is -4."),
        Call("inputs in quotes", lambda: pm.AllToShardedLinear("4", 4), "input_dims must be...but is '4'."),
        Call("half a group", lambda: quantized(63, 64), "input_dims must be a multiple of group_size (64); got 63."),
        Call("bits", lambda: quantized(64, 64, bits=9), "MLX has no affine quantization of group_size 64 and bits 9."),
        Call(
            "mode",
            lambda: quantized(64, 64, mode="int3"),
            "mode must be one of affine, mxfp4, mxfp8, nvfp4; got 'int3'.",
        ),
        Call(
            "half a group in rows",
            lambda: pm.QuantizedShardedToAllLinear(63, 64),
            "size 63 must be a whole number of units of 64.",
        ),
        Call(
            "no linear layer",
            lambda: pm.AllToShardedLinear.from_linear(mnn.Embedding(4, 4)),
            "Embedding cannot be split",
        ),
        Call(
            "not quantized",
            lambda: quantized.from_quantized_linear(plain),
            "Linear is not quantized. from_linear takes plain layers.",
        ),
        Call(
            "segments",
            lambda: pm.AllToShardedLinear.from_linear(plain, segments=3),
            "segments must divide the 4 elements evenly; got 3.",
        ),
        Call(
            "positions",
            lambda: pm.AllToShardedLinear.from_linear(plain, segments=[9]),
            "segments must ascend inside (0, 4); got [9]",
        ),
        Call(
            "sizes",
            lambda: pm.AllToShardedLinear.from_linear(plain, sizes=[3]),
            "sizes must be 1 positive numbers that add up to 4",
        ),
        Call(
            "sharding",
            lambda: pm.shard_linear(plain, "sharded"),
            "sharding must be 'all-to-sharded' or 'sharded-to-all'; got 'sharded'.",
        ),
        Call(
            "no axis",
            lambda: pm.shard_inplace(plain, lambda path, w: 7),
            "weight has 2 axes, but sharding returns axis 7 for it.",
        ),
        Call("backend", lambda: pm.init("pigeon"), "backend must be one of mpi, ring, jaccl, nccl; got 'pigeon'."),
        Call("no launcher", lambda: pm.init("ring"), "the ring backend needs a launcher, which sets MLX_HOSTFILE."),
        Call(
            "no other rank", lambda: pm.Communicator.single().send(mx.zeros(2), 1), "rank 0 of 1 cannot send to rank 1"
        ),
        Call(
            "loss",
            lambda: pm.vocab_parallel_cross_entropy(mx.zeros((2, 4)), mx.array([1]), pm.Communicator.single()),
            "logits must be (1, 4) on rank 0; got (2, 4).",
        ),
    ]
    for case in table:
        raises(case)


Made = tuple[str, str, str]
CALLS: list[Made] = [
    ("load: no name", "load('')", "'' does not exist. Give a folder with a config.json"),
    ("load: not there", "load('./nowhere')", "./nowhere does not exist. Give a folder"),
    ("load: no hub", "load('owner/name')", "owner/name is not a local folder...it cannot be reached"),
    ("load: a config", "load('config.json')", "config.json: is a config, which has no weights"),
    ("load: no ranks", "load('model', tp=0)", "tp must be a whole number of at least 1, but is 0."),
    ("load: ranks in quotes", "load('model', pp='2')", "pp must be a whole number of at least 1, but is '2'."),
    (
        "load: ranks that are not there",
        "load('model', tp=2)",
        "the mesh dp 1 x pp 1 x tp 2 has 2 ranks, but the run has 1. Start 2",
    ),
    ("load: layout", "load('model', layout=5)", "`layout` must be a text or a list...but is of type int"),
    (
        "load: dtype",
        "load('model', dtype='int8')",
        "dtype must be one of float64, float32, float16, bfloat16; got int8.",
    ),
    (
        "load: a plan's file",
        "load('model', 'plan.json')",
        "plan must be a Plan, but is 'plan.json'. Read a file with Plan.from_json",
    ),
    ("load: another's plan", "load('model', deeper)", "the plan"),
    ("fresh: not there", "fresh('nowhere.json')", "nowhere.json does not exist."),
    ("fresh: no family", "fresh({})", "model_type"),
    ("fresh: a number", "fresh(5)", "config must be a file, a folder...but is 5."),
    ("fresh: a family that nobody knows", "fresh({'model_type': 'nonsense'})", "nonsense"),
    ("fresh: seed", "fresh(LLAMA, seed='x')", "seed must be a whole number of at least 0, but is 'x'."),
    (
        "fresh: dtype",
        "fresh(LLAMA, dtype='int4')",
        "dtype must be one of float64, float32, float16, bfloat16; got int4.",
    ),
    (
        "shard: a name",
        "shard('model')",
        "model must be a module in memory; got 'model'. Use load() for a folder or a hub id.",
    ),
    ("save: not ours", "save(plain, 'new')", NOT_OURS),
    (
        "save: over a model",
        "save(load('model'), 'model')",
        "model: must hold no weights before a save, but holds ['model.safetensors']",
    ),
    ("save: over a file", "save(load('model'), 'words.txt')", "words.txt: cannot be created: Not a directory"),
    ("save: below a file", "save(load('model'), 'words.txt/new')", "cannot be created: Not a directory"),
    (
        "save: shards of nothing",
        "save(load('model'), 'new', max_shard_bytes=0)",
        "max_shard_bytes must be above 0, but is 0",
    ),
    ("auto: no layers", "pipeline_auto_parallel(plain, alone)", "no list of layers was found in Linear"),
    ("auto: from the second", "pipeline_auto_parallel(load('model'), alone, 1, 2)", "rank 0 requests layers 1 to 2"),
    ("auto: beyond the last", "pipeline_auto_parallel(load('model'), alone, 0, 9)", "rank 0 requests layers 0 to 9"),
    ("generate: not ours", "generate(plain, [[1]], Sampling())", NOT_OURS),
    ("generate: no prompts", "generate(load('model'), [], Sampling())", "prompts must contain at least one prompt."),
    (
        "generate: no tokens",
        "generate(load('model'), [[1], []], Sampling())",
        "prompt 1 is empty: it must have at least one token.",
    ),
    (
        "generate: no such id",
        "generate(load('model'), [[999]], Sampling())",
        "prompt 0 contains the id 999, but the model has ids 0 to 256.",
    ),
    (
        "generate: a text alone",
        "generate(load('model'), 'hello', Sampling())",
        "prompts must contain at least one prompt. Give a list of texts",
    ),
    (
        "generate: a stop",
        "generate(load('model'), [[1]], Sampling(stop=('x',)))",
        "stop needs a tokenizer to decode the text.",
    ),
    (
        "generate: beyond the positions",
        "generate(load('gpt2'), [[1] * 17], Sampling(1))",
        "needs 17 positions, but gpt2 has 16.",
    ),
    ("train: not ours", "train(plain, ids(99), SETTINGS)", NOT_OURS),
    (
        "train: too short",
        "train(load('model'), ids(8), SETTINGS)",
        "the text has 8 tokens, which is less than one sequence of 8 + 1.",
    ),
    (
        "train: no such id",
        "train(load('model'), ids(99) + 300, SETTINGS)",
        "tokens must be ids from 0 to 256, but one is 300.",
    ),
    (
        "train: fractions",
        "train(load('model'), ids(99) * 0.5, SETTINGS)",
        "tokens must be whole numbers [tokens], but are float",
    ),
    (
        "train: rows",
        "train(load('model'), ids(99).reshape(3, 3, 11), SETTINGS)",
        "tokens[0]: input_ids must be ids [tokens]",
    ),
    (
        "train: batch",
        "train(load('model'), ids(99), TrainSettings(1, 3, 8, microbatches=2))",
        "batch_size must be a multiple of...(1 x 2)",
    ),
    (
        "train: schedule",
        "train(load('model'), ids(99), TrainSettings(1, 2, 8, schedule='fast'))",
        "kind 'fast' is not known.",
    ),
    (
        "train: positions",
        "train(load('gpt2'), ids(99), TrainSettings(1, 1, 17))",
        "a sequence needs 17 positions, but gpt2 has 16.",
    ),
]
"""Of either engine alike: what is bad, the call, and the error."""

ONLY_TORCH: list[Made] = [
    (
        "load: device",
        "load('model', device='tpu')",
        "device must be available on this machine...got 'tpu'. Leave it out",
    ),
    (
        "load: device without memory",
        "load('model', device='meta')",
        "device must be able to store weights; got 'meta'.",
    ),
    ("load: placement", "load('model', placement='w')", "placement must be one of loop, v, but is 'w'."),
    ("load: vpp", "load('model', vpp=0)", "vpp must be a whole number of at least 1, but is 0."),
    ("adapters: not ours", "add_lora(plain, 4)", NOT_OURS),
    (
        "adapters: rank",
        "add_lora(load('model'), 0)",
        "the rank of LoRA must be an integer of at least 1; got 0.",
    ),
]


def parts(engine: str) -> dict[str, object]:
    """What the calls name."""
    plain: object = nn.Linear(4, 4)
    if engine == "mlx":
        import mlx.nn as mnn

        plain = mnn.Linear(4, 4)
    make = torch.zeros if engine == "torch" else np.zeros
    dtype = torch.int64 if engine == "torch" else np.int64
    settings = TrainSettings(steps=1, batch_size=2, sequence_length=8)
    module: ModuleType = importlib.import_module(f"partita.{engine}")
    return {
        **vars(module), "plain": plain, "alone": module.Communicator.single(), "deeper": deeper, "LLAMA": LLAMA,
        "Sampling": Sampling, "SETTINGS": settings, "TrainSettings": TrainSettings,
        "ids": lambda count: make(count, dtype=dtype),
    }  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "call", "says"), CALLS, ids=[name for name, _, _ in CALLS])
def test_either_engine(name: str, call: str, says: str, engine: str) -> None:
    with pytest.raises(ValueError if name != "load: ranks that are not there" else RuntimeError) as caught:
        eval(call, parts(engine))
    assert type(caught.value).__module__ == "partita.errors"
    assert "\n" not in str(caught.value)
    assert holds(str(caught.value), says), caught.value


@pytest.mark.parametrize(("name", "call", "says"), ONLY_TORCH, ids=[name for name, _, _ in ONLY_TORCH])
def test_torch_alone(name: str, call: str, says: str) -> None:
    test_either_engine(name, call, says, "torch")
