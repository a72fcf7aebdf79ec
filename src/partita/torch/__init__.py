"""The PyTorch engine: it executes plans on torch.distributed."""

from partita.torch.comm import Communicator
from partita.torch.embedding import ParallelEmbedding, VocabParallelEmbedding
from partita.torch.groups import (
    GroupInfo,
    ParallelGroups,
    init_parallelism,
    initialize_parallelism,
    make_groups,
    parallel_group_info,
    parallelism_is_initialized,
    reset_parallelism,
)
from partita.torch.init import InitType, initialize_model_parallel_affine_weight_
from partita.torch.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.load import load, shard
from partita.torch.lora import LoraLinear
from partita.torch.loss import vocab_parallel_cross_entropy
from partita.torch.seed import mp_copy, mp_gather, mp_reduce, mp_scatter

__all__ = [
    "ColumnParallelLinear",
    "Communicator",
    "GroupInfo",
    "InitType",
    "LoraLinear",
    "ParallelEmbedding",
    "ParallelGroups",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "init_parallelism",
    "initialize_model_parallel_affine_weight_",
    "initialize_parallelism",
    "load",
    "make_groups",
    "mp_copy",
    "mp_gather",
    "mp_reduce",
    "mp_scatter",
    "parallel_group_info",
    "parallelism_is_initialized",
    "reset_parallelism",
    "shard",
    "vocab_parallel_cross_entropy",
]
