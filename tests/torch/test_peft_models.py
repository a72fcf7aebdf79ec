"""peft on split models against peft on the unsplit one: the same seed, outputs, gradients and trained adapters."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from partita.errors import ModelError
from partita.torch import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, shard
from partita.torch.model.parts import unsplit_name
from tests.support.compare import assert_equal, part
from tests.support.models import CONFIGS as FAMILIES
from tests.support.ranks import ranks

F64 = torch.float64
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3},
    "names": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian"},
    "pattern": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "ranks": {
        "target_modules": LINEARS, "rank_pattern": {"q_proj": 3, r"model\.layers\.1\..*\.down_proj": 1},
        "alpha_pattern": {"o_proj": 7, "q_proj": 5},
    },
    "rslora": {"target_modules": LINEARS, "use_rslora": True, "r": 4, "init_lora_weights": "orthogonal"},
    "dora": {"target_modules": [*LINEARS, "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "dora-embedding": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "some-layers": {"target_modules": LINEARS, "layers_to_transform": [1], "layers_pattern": "layers"},
    "first-layer": {"target_modules": ["model.layers.0.self_attn.v_proj"], "use_dora": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "biases": {"target_modules": LINEARS, "lora_bias": True, "init_lora_weights": False},
    "dropout": {"target_modules": LINEARS, "lora_dropout": 0.4},
}  # fmt: skip
LAYOUTS: list[dict[str, int]] = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]


def llama(dtype: torch.dtype = F64) -> nn.Module:
    """Five heads that share one KV head: over two ranks one has three heads, and both have the KV head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=20, intermediate_size=14, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=1, initializer_range=0.4, attn_implementation="eager", tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return model


def adapted(model: nn.Module, settings: dict[str, Any]) -> Any:
    import peft

    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **settings}))


SPLIT_DIMS: dict[type, dict[str, int]] = {
    ColumnParallelLinear: {"lora_B": 0, "lora_magnitude_vector": 0, "weight": 0, "bias": 0},
    RowParallelLinear: {"lora_A": 1, "weight": 1},
    VocabParallelEmbedding: {"lora_embedding_A": 1, "weight": 0},
}


def own(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a tensor of the unsplit model, by its name in the split model."""
    layer: Any = None
    module: Any = model
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        layer = module if type(module) in SPLIT_DIMS else layer
    kind = next((step for step in name.split(".") if step.startswith("lora_")), name.split(".")[-1])
    # A row layer's own bias is not in its inner layer.
    dim = None if layer is None or (layer is module and kind == "bias") else SPLIT_DIMS[type(layer)].get(kind)
    if dim is not None and kind == "weight" and getattr(layer, "transposed", False):
        dim = 1 - dim  # transformers' Conv1D
    return whole if dim is None else part(whole, dim, layer.split.ranges(layer.comm.rank))


def same(split: Any, whole: Any, what: str, grads: bool = False) -> int:
    """Compare every parameter of this rank with the unsplit model's, or every gradient; returns how many are trained."""
    true = {unsplit_name(name): p for name, p in whole.named_parameters(remove_duplicate=False)}
    trained = 0
    for name, parameter in split.named_parameters():
        other = true[unsplit_name(name)]
        assert parameter.requires_grad == other.requires_grad, name
        trained += parameter.requires_grad
        if not grads:
            assert_equal(parameter, own(split, name, other), what=f"{what}: {name}")
        elif other.grad is not None or parameter.grad is not None:
            assert_equal(parameter.grad, own(split, name, other.grad), what=f"{what}: gradient of {name}")
    return trained


def equals_unsplit(case: str, layout: dict[str, int]) -> int:
    warnings.simplefilter("ignore")
    split, whole = (adapted(model, CONFIGS[case]) for model in (shard(llama(), **layout), llama()))
    trained = same(split, whole, "new")
    ids = torch.arange(12).view(2, 6) * 5 % 31
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))], lr=0.3)
        for m in (split, whole)
    ]
    for step in range(3):
        outputs = []
        for model in (split, whole):
            model.train("lora_dropout" in CONFIGS[case] and "pp" not in layout)
            torch.manual_seed(step)
            outputs.append(model(input_ids=ids, labels=ids))
            model.zero_grad()
            outputs[-1].loss.backward()
        assert_equal(outputs[0].logits, outputs[1].logits, what=f"logits of step {step}")
        same(split, whole, f"step {step}", grads=True)
        for optimizer in optimizers:
            optimizer.step()
    same(split, whole, "trained")
    return trained


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_equals_peft_on_the_unsplit_model(case: str, layout: dict[str, int]) -> None:
    pytest.importorskip("peft")
    size = 4 if len(layout) == 2 else 2
    assert any(ranks(size).run(equals_unsplit, case, layout))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.arange(8).view(1, 8)).logits
    return out


def shake(model: Any) -> None:
    """Give the adapters values by their names, the same on every mesh."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = unsplit_name(name)
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                whole = torch.randn(SHAPES[key], generator=generator, dtype=F64) * 0.3
                parameter.copy_(own(model, name, whole))


SHAPES: dict[str, torch.Size] = {}


def saved_and_read(case: str, layout: dict[str, int], folder: str) -> None:
    """From the split model through a file into the unsplit one, and back through peft's own file."""
    import peft

    import partita.torch as pt

    warnings.simplefilter("ignore")
    whole = adapted(llama(), CONFIGS[case])
    SHAPES.clear()
    SHAPES.update({unsplit_name(name): p.shape for name, p in whole.named_parameters()})
    shake(whole)
    expected = logits_of(whole.eval())
    split = adapted(shard(llama(), **layout), CONFIGS[case])
    shake(split)
    assert_equal(logits_of(split.eval()), expected, what="split")
    pt.save_adapters(split, f"{folder}/ours")
    split.save_pretrained(f"{folder}/ours-again")
    if torch.distributed.get_rank() == 0:
        whole.save_pretrained(f"{folder}/plain")
        for name in ("ours", "ours-again"):
            assert_equal(
                logits_of(peft.PeftModel.from_pretrained(llama(), f"{folder}/{name}").eval()), expected, what=name
            )
    torch.distributed.barrier()
    for name in ("plain", "ours"):
        again = shard(llama(), **layout)
        pt.load_adapters(again, f"{folder}/{name}")
        assert_equal(logits_of(again.eval()), expected, what=f"load_adapters of {name}")
        again = peft.PeftModel.from_pretrained(shard(llama(), **layout), f"{folder}/{name}")
        assert_equal(logits_of(again.eval()), expected, what=f"from_pretrained of {name}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_files_are_those_of_the_unsplit_model(case: str, layout: dict[str, int], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ranks(4 if len(layout) == 2 else 2).run(saved_and_read, case, layout, str(tmp_path))


def weights_decomposed(init: str, layout: dict[str, int]) -> None:
    """PiSSA and OLoRA decompose the unsplit weight and change it: adapters, base and outputs equal the unsplit model's."""
    import peft

    warnings.simplefilter("ignore")
    settings = {"target_modules": [*LINEARS, "lm_head"], "init_lora_weights": init, "lora_alpha": 3}
    split = adapted(shard(llama(torch.float32), **layout), settings)
    whole = adapted(llama(torch.float32), settings)
    true = {unsplit_name(name): p for name, p in whole.named_parameters()}
    for name, parameter in split.named_parameters():
        # Both decompose the same matrix with the same routine: the bits are the same.
        assert_equal(parameter, own(split, name, true[unsplit_name(name)]), 0, name)
    assert_equal(logits_of(split), logits_of(whole), 1e-5, "logits")  # sums in float32, in another order
    with pytest.raises(
        ModelError, match=r"init_lora_weights='pissa' needs float32, float16 or bfloat16 weights; got float64"
    ):
        peft.get_peft_model(
            shard(llama(), **layout), peft.LoraConfig(target_modules=LINEARS, init_lora_weights="pissa")
        )


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initializations_from_the_unsplit_weight(init: str, layout: dict[str, int]) -> None:
    pytest.importorskip("peft")
    ranks(2).run(weights_decomposed, init, layout)


def narrow_weights() -> None:
    """peft replaces adapters of bfloat16 weights by float32 ones after it added them: they stay the unsplit model's."""
    warnings.simplefilter("ignore")
    settings = {"target_modules": LINEARS, "use_dora": True, "init_lora_weights": False}
    split, whole = adapted(shard(llama(torch.bfloat16), tp=2), settings), adapted(llama(torch.bfloat16), settings)
    outputs = [
        model(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6)) for model in (split, whole)
    ]
    true = {unsplit_name(name): p for name, p in whole.named_parameters()}
    for output in outputs:
        output.loss.backward()
    for name, parameter in split.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            # A norm of bfloat16 weights is rounded to bfloat16 (8 bits) after another order of summation.
            tolerance = 2**-7 if "magnitude" in name else 0
            assert_equal(parameter, own(split, name, true[unsplit_name(name)]), tolerance, name)
            if parameter.shape == true[unsplit_name(name)].shape:
                grads = [torch.empty_like(parameter) for _ in range(2)]
                torch.distributed.all_gather(grads, parameter.grad)
                assert_equal(grads[0], grads[1], 0, f"gradient of {name}, which both ranks hold")


def test_adapters_of_bfloat16_weights() -> None:
    pytest.importorskip("peft")
    ranks(2).run(narrow_weights)


def several(layout: dict[str, int], folder: str) -> None:
    """Two adapters by name, chosen in turn, removed, and merged."""
    import partita.torch as pt

    warnings.simplefilter("ignore")
    expected: dict[str | None, Tensor] = {None: logits_of(llama())}
    cases = {"a": {"target_modules": LINEARS, "use_dora": True}, "b": CONFIGS["saved"]}
    for name, case in cases.items():
        whole = adapted(llama(), case)
        SHAPES.clear()
        SHAPES.update({unsplit_name(key): p.shape for key, p in whole.named_parameters()})
        shake(whole)
        expected[name] = logits_of(whole.eval())
        if torch.distributed.get_rank() == 0:
            whole.save_pretrained(f"{folder}/{name}")
        assert float((expected[name] - expected[None]).abs().max()) > 0.1
    if torch.distributed.get_rank() == 0:
        adapted(llama(), CONFIGS["head"]).save_pretrained(f"{folder}/head")
    torch.distributed.barrier()
    split = shard(llama(), **layout)
    for name in cases:
        pt.load_adapters(split, f"{folder}/{name}", name=name)
    for name in ("a", None, "b", "a", None):
        pt.set_adapter(split, name)
        assert_equal(logits_of(split.eval()), expected[name], what=f"adapter {name}")
    for call, why in (
        (lambda: pt.set_adapter(split, "c"), "name must be one of the model's adapters, a, b; got 'c'"),
        (lambda: pt.load_adapters(split, f"{folder}/a", name="a"), "has an adapter 'a' already"),
        (
            lambda: pt.load_adapters(split, f"{folder}/head", name="c"),
            "'c' adapts lm_head, which the adapter 'b' trains as a module of its own",
        ),
        (lambda: pt.save_adapters(split, f"{folder}/none"), "name must be one of the model's adapters, a, b; got None"),
    ):
        with pytest.raises(ModelError, match=why):
            call()
    pt.set_adapter(split, "b")
    pt.save_adapters(split, f"{folder}/b-again", name="b")
    pt.unload_lora(split)
    assert_equal(logits_of(split), expected[None], what="unloaded")
    for name in cases:
        again = shard(llama(), **layout)
        pt.load_adapters(again, f"{folder}/{name}", name=name)
        pt.merge_lora(again)
        assert_equal(logits_of(again.eval()), expected[name], 1e-11, f"merged {name}")
        pt.save(again, f"{folder}/merged-{name}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_several_adapters_are_chosen_merged_and_removed(layout: dict[str, int], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ranks(4 if len(layout) == 2 else 2).run(several, layout, str(tmp_path))
    for name in ("a", "b"):
        merged = llama()
        merged.load_state_dict(load_file(tmp_path / f"merged-{name}" / "model.safetensors"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = peft.PeftModel.from_pretrained(llama(), tmp_path / (name if name == "a" else "b-again")).eval()
        assert_equal(logits_of(merged.eval()), logits_of(whole), 1e-11, f"saved {name}")


def tied(layout: dict[str, int]) -> None:
    """The head shares the embedding's weight: an adapter of one leaves the other alone, as in the unsplit model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.simplefilter("ignore")

    def model() -> nn.Module:
        config = LlamaConfig(
            vocab_size=31, hidden_size=20, intermediate_size=14, num_hidden_layers=2, num_attention_heads=5,
            num_key_value_heads=1, initializer_range=0.4, attn_implementation="eager", tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(1)
        made: nn.Module = LlamaForCausalLM(config).double().eval()
        return made

    for settings in (
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        split, whole = adapted(shard(model(), **layout), settings), adapted(model(), settings)
        ids = torch.arange(12).view(2, 6)
        outputs = [m(input_ids=ids, labels=ids) for m in (split, whole)]
        assert_equal(outputs[0].logits, outputs[1].logits, what="logits")
        for output in outputs:
            output.loss.backward()
        same(split, whole, f"tied {settings}", grads=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tied_head(layout: dict[str, int]) -> None:
    pytest.importorskip("peft")
    ranks(4 if len(layout) == 2 else 2).run(tied, layout)


def other_families() -> None:
    """Weights stored as `[in, out]`; experts in one tensor, which peft adapts in a way of its own."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    warnings.simplefilter("ignore")

    def model(name: str) -> nn.Module:
        quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
        torch.manual_seed(1)
        made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**FAMILIES[name], **quiet}))
        return made.double().eval()

    settings = {"target_modules": "all-linear", "use_dora": True}
    split, whole = adapted(shard(model("gpt2"), tp=2), settings), adapted(model("gpt2"), settings)
    ids = torch.arange(12).view(2, 6)
    outputs = []
    for one in (split, whole):
        torch.manual_seed(3)
        outputs.append(one.train()(input_ids=ids, labels=ids))
        outputs[-1].loss.backward()
    assert_equal(outputs[0].logits, outputs[1].logits, what="logits")
    same(split, whole, "gpt2", grads=True)
    with pytest.raises(
        ModelError, match=r"by target_parameters, which does not work on a split model. Name linear layers"
    ):
        peft.get_peft_model(shard(model("qwen3-moe"), tp=2), peft.LoraConfig(target_modules="all-linear"))


def test_other_families() -> None:
    pytest.importorskip("peft")
    ranks(2).run(other_families)
