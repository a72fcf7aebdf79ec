"""Published measurements that were entered after all numbers had been chosen: no number was calibrated with them.

Where a source does not print a number, the row's docstring says what we assume, and by which rule; no assumption was varied to
reduce an error. Their first errors showed what the formulas lacked: products in FP8, collectives of tensor ranks beside
products (`megatron-core`), and gradients that are summed while several micro-batches pass (interleaved stages).
"""

from __future__ import annotations

from dataclasses import replace

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Work
from tests.cost.published import Row, flops, gpt, held_out, llama, show


def _megatron_core() -> list[Row]:
    """NVIDIA/Megatron-LM, images/model_table.png (Megatron-Core 0.8): teraflop/s of a GPU, 4,096 tokens, vocabulary 131,072.

    Not printed: micro-batches (all sequences of a replica where nothing is pipelined, else one), virtual stages (two layers, or
    one where two do not divide), the ZeRO stage (1, the distributed optimizer, whose communication the README overlaps).
    """
    table = [
        ("1.7B", 16, 2048, 24, 1, 1, 192, 408.8),
        ("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
        ("16B", 48, 6144, 32, 4, 1, 192, 489.1),
        ("32B", 56, 7168, 48, 8, 1, 192, 459.6),
        ("70B", 64, 8192, 84, 8, 2, 384, 419.7),
        ("119B", 80, 10240, 92, 8, 4, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 1152, 432.8),
        ("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
        ("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
    ]
    rows = []
    for name, heads, hidden, layers, tp, pp, batch, teraflops in table:
        config = {**gpt(hidden, heads, layers, 131072, 4096)}
        dp, gpus = 48, 48 * tp * pp
        each = 1 if pp == 1 else 2 if layers % (2 * pp) == 0 else 1
        stages = layers // each if pp > 1 else 1
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=pp, tp=tp), layers=(layers // stages,) * stages, microbatches=1 if pp == 1 else batch // dp,
            schedule="interleaved-1f1b" if pp > 1 else "1f1b", zero=1, sequence_parallel=tp > 1, overlap_gradients=True,
        )  # fmt: skip
        work = Work(batch_size=batch, sequence_length=4096, gradient_dtype="float32")
        seconds = flops(config, batch, 4096, 3) / (gpus * teraflops * 1e12)
        rows.append(held_out("Megatron-Core", name, "s", seconds, config, ("h100", "megatron-core"), work, arrangement))
    return rows


def _ptd_p() -> list[Row]:
    """2104.04473, table 2: teraflop/s of an A100 with PTD-P, as seconds of an iteration (its equation 3), micro-batches of one.

    Not printed: virtual stages (none, the paper's default schedule), the gradients' dtype (as in table 1).
    """
    table = [
        ("174.6B on 384", 12288, 96, 96, 12, 1536, 384, 153), ("174.6B on 768", 12288, 96, 96, 12, 1536, 768, 149),
        ("174.6B on 1536", 12288, 96, 96, 12, 1536, 1536, 141), ("529.6B on 560", 20480, 128, 105, 35, 2240, 560, 171),
        ("529.6B on 1120", 20480, 128, 105, 35, 2240, 1120, 167), ("529.6B on 2240", 20480, 128, 105, 35, 2240, 2240, 159),
    ]  # fmt: skip
    rows = []
    for name, hidden, heads, layers, pp, batch, gpus, teraflops in table:
        config, dp = gpt(hidden, heads, layers), gpus // (8 * pp)
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=pp, tp=8), layers=(layers // pp,) * pp, microbatches=batch // dp, recompute="full"
        )
        work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="bfloat16")
        seconds = flops(config, batch, 2048, 4) / (gpus * teraflops * 1e12)
        rows.append(held_out("PTD-P", name, "s", seconds, config, ("a100-80gb", "megatron-2021"), work, arrangement))
    return rows


def _mt_nlg() -> list[Row]:
    """2201.11990, section 2.4: seconds of an iteration of 530B on 280, 350 and 420 DGX A100, 1,920 sequences of 2,048 tokens.

    Not printed: micro-batches of one sequence, 1F1B without virtual stages (DeepSpeed has no others), no ZeRO.
    """
    config = gpt(20480, 128, 105, 50304)
    rows = []
    for nodes, value in ((280, 60.1), (350, 50.2), (420, 44.4)):
        dp = nodes // 35
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=35, tp=8), layers=(3,) * 35, microbatches=1920 // dp, recompute="full"
        )
        work = Work(batch_size=1920, sequence_length=2048, gradient_dtype="float32")
        rows.append(
            held_out(
                "MT-NLG", f"530B on {nodes}", "s", value, config, ("a100-80gb", "megatron-2021"), work, arrangement
            )
        )
    return rows


def _bloom() -> list[Row]:
    """bigscience-workshop/bigscience, train/tr11-176B-ml/README.md: 105 s of an iteration of 2,048 sequences on 384 A100.

    The machines have four ports of 100 Gb/s for eight GPUs. The model is the GPT with the same tensors, since Megatron splits
    its attention.
    """
    config = gpt(14336, 112, 70, 250880)
    arrangement = Arrangement(
        mesh=Mesh(dp=8, pp=12, tp=4), layers=(5, *(6,) * 10, 5), microbatches=128, zero=1, recompute="full"
    )
    work = Work(batch_size=2048, sequence_length=2048, gradient_dtype="float32")
    row = held_out("BLOOM", "176B", "s", 105, config, ("a100-80gb", "megatron-2021"), work, arrangement)
    return [replace(row, network=6.25e9)]


def _bloom_trials() -> list[Row]:
    """The same repository, train/tr11-176B-ml/chronicles-prequel.md, 25 to 28 February: what was tried before.

    One machine without pipeline and replicas; 181B and 176B with other meshes and micro-batches.
    """
    table = [
        # hidden, layers, dp, tp, pp, sequences of a micro-batch, sequences, seconds
        (14336, 6, 1, 8, 1, 2, 512, 119.19), (14336, 10, 1, 8, 1, 1, 512, 205.52), (14336, 72, 8, 8, 6, 4, 2048, 114.11),
        (14336, 72, 4, 8, 12, 4, 2048, 117.07), (14336, 72, 8, 4, 12, 4, 2048, 111.89), (14336, 72, 8, 4, 12, 2, 2048, 110.48),
        (14336, 72, 16, 4, 6, 2, 2048, 111.71), (14336, 72, 16, 2, 12, 2, 2048, 112.50), (14336, 72, 8, 2, 24, 1, 2048, 119.53),
        (14336, 72, 8, 2, 24, 2, 2048, 122.75),
    ]  # fmt: skip
    rows = []
    for hidden, layers, dp, tp, pp, micro, batch, value in table:
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=pp, tp=tp), layers=(layers // pp,) * pp, microbatches=batch // dp // micro, zero=min(1, dp - 1),
            recompute="full",
        )  # fmt: skip
        work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="bfloat16")
        row = held_out(
            "BLOOM's trials", f"{layers} layers, dp {dp} tp {tp} pp {pp}, {micro}", "s", value, gpt(hidden, 64, layers, 250880),
            ("a100-80gb", "megatron-2021"), work, arrangement,
        )  # fmt: skip
        rows.append(replace(row, network=6.25e9))
    return rows


def _opt() -> list[Row]:
    """2205.01068, section 2.4: "up to 147 TFLOP/s per GPU" of OPT-175B on 992 A100, with FSDP and tensor parallelism.

    Not printed: what the operations count (taken as recomputation included), the batch's sequences (2M tokens: 992), 8 tensor
    ranks (metaseq's own script), one micro-batch of all 8 sequences of a replica.
    """
    config = {
        "model_type": "opt", "hidden_size": 12288, "ffn_dim": 49152, "num_attention_heads": 96, "num_hidden_layers": 96,
        "vocab_size": 50272, "word_embed_proj_dim": 12288, "dtype": "float16",
    }  # fmt: skip
    arrangement = Arrangement(mesh=Mesh(dp=124, tp=8), zero=3, recompute="full")
    work = Work(batch_size=992, sequence_length=2048, gradient_dtype="float16")
    seconds = flops(gpt(12288, 96, 96, 50272), 992, 2048, 4) / (992 * 147e12)
    return [held_out("OPT", "175B", "s", seconds, config, ("a100-80gb", "megatron-2021"), work, arrangement)]


def _neox() -> list[Row]:
    """EleutherAI/gpt-neox, configs/20B.yml, and 2204.06745: 117 teraflop/s of each of 96 A100 with 40 GB."""
    config = {
        "model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
        "num_hidden_layers": 44, "vocab_size": 50432, "dtype": "float16", "tie_word_embeddings": False,
    }  # fmt: skip
    arrangement = Arrangement(mesh=Mesh(dp=12, pp=4, tp=2), layers=(11,) * 4, microbatches=32, zero=1, recompute="full")
    work = Work(batch_size=1536, sequence_length=2048, gradient_dtype="float16")
    seconds = flops(gpt(6144, 64, 44, 50432), 1536, 2048, 4) / (96 * 117e12)
    return [held_out("GPT-NeoX", "20B", "s", seconds, config, ("a100-40gb", "megatron-2021"), work, arrangement)]


def _deepseek() -> list[Row]:
    """2412.19437, section 1: 180K hours of an H800 for 1T tokens; 15,360 sequences of 4,096 tokens, pp 16, ep 64, ZeRO 1, FP8.

    Its schedule is entered as ZB-H1, an H800 as an H100.
    """
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
        "num_nextn_predict_layers": 1, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    arrangement = Arrangement(
        mesh=Mesh(dp=128, pp=16, ep=64), layers=(*(4,) * 15, 1), microbatches=120, zero=1, schedule="zb-h1",
        overlap_gradients=True,
    )  # fmt: skip
    work = Work(batch_size=15360, sequence_length=4096, gradient_dtype="float32", product_dtype="float8_e4m3fn")
    seconds = 180e3 * 3600 / 2048 * 15360 * 4096 / 1e12
    return [held_out("DeepSeek-V3", "671B", "s", seconds, config, ("h100", "dualpipe"), work, arrangement)]


def _nemo() -> list[Row]:
    """NVIDIA/NeMo, docs/source/performance/performance_summary.md (container 24.07): tokens/s of an H100, with products in FP8.

    Not printed: the distributed optimizer (ZeRO 1) with overlap, and sequence parallelism where there are tensor ranks.
    """
    llama2 = 32000
    table = [
        ("GPT3 175B", gpt(12288, 96, 96), 128, 256, 1, 2048, 4, 8, 1, 6, 726),
        ("GPT3 175B, 512", gpt(12288, 96, 96), 512, 2048, 2, 2048, 4, 8, 1, 6, 782),
        ("Llama 2 7B", llama(4096, 32, 32, 32, 11008, llama2), 8, 128, 1, 4096, 1, 1, 1, 1, 16847),
        ("Llama 2 13B", llama(5120, 40, 40, 40, 13824, llama2), 16, 128, 1, 4096, 1, 4, 1, 10, 8646),
        ("Llama 2 70B", llama(8192, 64, 8, 80, 28672, llama2), 64, 128, 1, 4096, 4, 4, 1, 20, 1707),
        ("Llama 3 8B", llama(4096, 32, 8, 32, 14336), 8, 128, 1, 8192, 1, 1, 2, 1, 12036),
        ("Llama 3 70B", llama(8192, 64, 8, 80, 28672), 64, 128, 1, 8192, 4, 4, 2, 5, 1533),
    ]
    rows = []
    for name, config, gpus, batch, micro, length, tp, pp, cp, vpp, value in table:
        layers = config.get("n_layer") or config["num_hidden_layers"]
        dp = gpus // (tp * pp * cp)
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=pp, tp=tp, cp=cp), layers=(layers // (pp * vpp),) * (pp * vpp),
            schedule="interleaved-1f1b" if vpp > 1 else "1f1b", microbatches=batch // dp // micro, zero=1,
            sequence_parallel=tp > 1, overlap_gradients=True,
        )  # fmt: skip
        work = Work(batch_size=batch, sequence_length=length, gradient_dtype="bfloat16", product_dtype="float8_e4m3fn")
        rows.append(
            held_out("NeMo, FP8", name, "tokens/s", value, config, ("h100", "megatron-core"), work, arrangement)
        )
    return rows


UNSEEN = (
    *_ptd_p(),
    *_megatron_core(),
    *_mt_nlg(),
    *_bloom(),
    *_bloom_trials(),
    *_opt(),
    *_neox(),
    *_deepseek(),
    *_nemo(),
)


if __name__ == "__main__":
    show(UNSEEN)
