"""The MLX engine: it executes plans on mlx.distributed (Open MPI, MLX's ring, JACCL, NCCL)."""

try:
    import mlx.core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "partita.mlx needs MLX, which is not installed: pip install 'partita[mlx]'", name="mlx"
    ) from error

from partita.mlx.checked import CheckedCommunicator
from partita.mlx.comm import Communicator
from partita.mlx.embedding import VocabParallelEmbedding
from partita.mlx.groups import ParallelGroups, init, make_groups
from partita.mlx.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.loss import vocab_parallel_cross_entropy
from partita.mlx.mappings import all_gather, copy_to, gather_from, reduce_from, reduce_scatter, scatter_to
from partita.mlx.shard import shard_inplace, shard_linear
from partita.mlx.sharded import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)

__all__ = [
    "AllToShardedLinear",
    "CheckedCommunicator",
    "ColumnParallelLinear",
    "Communicator",
    "ParallelGroups",
    "QuantizedAllToShardedLinear",
    "QuantizedShardedToAllLinear",
    "RowParallelLinear",
    "ShardedToAllLinear",
    "VocabParallelEmbedding",
    "all_gather",
    "copy_to",
    "gather_from",
    "init",
    "make_groups",
    "reduce_from",
    "reduce_scatter",
    "scatter_to",
    "shard_inplace",
    "shard_linear",
    "vocab_parallel_cross_entropy",
]
