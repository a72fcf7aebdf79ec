"""The MLX engine: it executes plans on mlx.distributed (Open MPI, MLX's ring, JACCL, NCCL)."""

try:
    import mlx.core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "partita.mlx needs MLX, which is not installed: pip install 'partita[mlx]'", name="mlx"
    ) from error

from partita.generation import Generation, GenerationReport, Sampling
from partita.mlx.auto import pipeline_auto_parallel
from partita.mlx.collectives.checked import CheckedCommunicator
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups, init, join, leave, make_groups
from partita.mlx.collectives.mappings import all_gather, copy_to, gather_from, reduce_from, reduce_scatter, scatter_to
from partita.mlx.generate import generate
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.loss import vocab_parallel_cross_entropy
from partita.mlx.layers.sharded import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from partita.mlx.layers.sharding import shard_inplace, shard_linear
from partita.mlx.load import load, shard
from partita.mlx.model.parts import plan_of
from partita.mlx.new import fresh
from partita.mlx.serving import serving_loop
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import train
from partita.mlx.verify import verify
from partita.mlx.weights.adapters import add_lora
from partita.mlx.weights.named_adapters import merge_lora, set_adapter, unload_lora
from partita.mlx.weights.peft_format import load_adapters, save_adapters
from partita.mlx.weights.save import save
from partita.training import Follow, Profile, SaveReport, Saves, StepReport, TrainSettings

__all__ = [
    "AllToShardedLinear",
    "CheckedCommunicator",
    "ColumnParallelLinear",
    "Communicator",
    "Follow",
    "Generation",
    "GenerationReport",
    "ParallelGroups",
    "Pipeline",
    "Profile",
    "QuantizedAllToShardedLinear",
    "QuantizedShardedToAllLinear",
    "RowParallelLinear",
    "Sampling",
    "SaveReport",
    "Saves",
    "ShardedToAllLinear",
    "StepReport",
    "TrainSettings",
    "VocabParallelEmbedding",
    "add_lora",
    "all_gather",
    "copy_to",
    "fresh",
    "gather_from",
    "generate",
    "init",
    "join",
    "leave",
    "load",
    "load_adapters",
    "make_groups",
    "merge_lora",
    "pipeline_auto_parallel",
    "plan_of",
    "reduce_from",
    "reduce_scatter",
    "save",
    "save_adapters",
    "scatter_to",
    "serving_loop",
    "set_adapter",
    "shard",
    "shard_inplace",
    "shard_linear",
    "train",
    "unload_lora",
    "verify",
    "vocab_parallel_cross_entropy",
]
