"""The PyTorch engine: it executes plans on torch.distributed."""

from partita.generation import Generation, GenerationReport, Sampling, Tokenizer, byte_tokenizer, load_tokenizer
from partita.torch.auto import pipeline_auto_parallel
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import (
    GroupInfo,
    ParallelGroups,
    init_parallelism,
    initialize_parallelism,
    join,
    leave,
    make_groups,
    parallel_group_info,
    parallelism_is_initialized,
    reset_parallelism,
)
from partita.torch.compile import compile_layers
from partita.torch.generate import generate
from partita.torch.layers.embedding import ParallelEmbedding, VocabParallelEmbedding
from partita.torch.layers.init import InitType, initialize_model_parallel_affine_weight_
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.layers.lora import LoraLinear
from partita.torch.layers.loss import vocab_parallel_cross_entropy
from partita.torch.load import load, shard
from partita.torch.loops.norms import clip_grad_norm_
from partita.torch.loops.optimizers import elementwise_optimizer
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.peft_hooks import join_peft, when_imported
from partita.torch.quantized.tensor import dequantize
from partita.torch.seed import mp_copy, mp_gather, mp_reduce, mp_scatter
from partita.torch.serving import serving_loop
from partita.torch.stages.pipeline import Pipeline
from partita.torch.train import StepReport, TrainSettings, train
from partita.torch.trainer import split_trainer
from partita.torch.training.texts import load_tokens
from partita.torch.verify import verify
from partita.torch.weights.adapters import add_lora, merge_lora, set_adapter, unload_lora
from partita.torch.weights.peft_format import load_adapters, save_adapters
from partita.torch.weights.save import save
from partita.training import Follow, Profile, SaveReport, Saves

__all__ = [
    "ColumnParallelLinear",
    "Communicator",
    "Float64Everywhere",
    "Follow",
    "Generation",
    "GenerationReport",
    "GroupInfo",
    "InitType",
    "LoraLinear",
    "ParallelEmbedding",
    "ParallelGroups",
    "Pipeline",
    "Profile",
    "RowParallelLinear",
    "Sampling",
    "SaveReport",
    "Saves",
    "StepReport",
    "Tokenizer",
    "TrainSettings",
    "VocabParallelEmbedding",
    "add_lora",
    "byte_tokenizer",
    "clip_grad_norm_",
    "compile_layers",
    "dequantize",
    "elementwise_optimizer",
    "fresh",
    "generate",
    "init_parallelism",
    "initialize_model_parallel_affine_weight_",
    "initialize_parallelism",
    "join",
    "leave",
    "load",
    "load_adapters",
    "load_tokenizer",
    "load_tokens",
    "make_groups",
    "merge_lora",
    "mp_copy",
    "mp_gather",
    "mp_reduce",
    "mp_scatter",
    "parallel_group_info",
    "parallelism_is_initialized",
    "pipeline_auto_parallel",
    "plan_of",
    "reset_parallelism",
    "save",
    "save_adapters",
    "serving_loop",
    "set_adapter",
    "shard",
    "split_trainer",
    "train",
    "unload_lora",
    "verify",
    "vocab_parallel_cross_entropy",
]

when_imported("peft", join_peft)
