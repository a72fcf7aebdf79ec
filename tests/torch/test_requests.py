"""What a caller can ask of a forward, over every kind of mesh: complete and equal to the unsplit model's, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.torch import Float64Everywhere
from partita.torch.load import shard
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit
from partita.torch.transformers_internals import cache_argument, cache_of
from tests.support.ranks import ranks
from tests.torch.test_stage import deep

EXACT = 1e-12

IDS = torch.tensor([[5, 17, 3, 29, 11, 8], [2, 40, 7, 19, 23, 31]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LENGTH = IDS.shape[1]

ENCODER_DECODER: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 3,
           "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0},
    "bart": {"model_type": "bart", "vocab_size": 101, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37,
             "max_position_embeddings": 64, "architectures": ["BartForConditionalGeneration"]},
}  # fmt: skip


def pair(name: str, where: Mapping[str, Any], **config: Any) -> tuple[nn.Module, nn.Module]:
    """A float64 model that computes attention plainly, and its copy that is split over the ranks of the run."""
    data = ENCODER_DECODER[name] if name in ENCODER_DECODER else deep(name)
    attention = config.pop("attention", "eager")
    unsplit = fill_unsplit(build_on_meta(read_hf_config({**data, **config}), torch.float64))
    unsplit.set_attn_implementation(attention)  # type: ignore[operator]
    return unsplit, shard(copy.deepcopy(unsplit), **where)


# --- what is asked, as a call of a model that returns its outputs ---------------------------------------------------------


def _plain(model: Any, **asked: Any) -> Any:
    given = {"input_ids": IDS, "attention_mask": MASK, **asked}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS
    return model(**given)


def asking(**asked: Any) -> Callable[[Any], Any]:
    return lambda model: _plain(model, **asked)


def _embeds(model: Any) -> Any:
    # OPT's and ELECTRA's embedding is not as wide as their layers.
    width = getattr(model.config, "word_embed_proj_dim", model.config.hidden_size)
    embeds = torch.randn(2, LENGTH, width, generator=torch.Generator().manual_seed(1))
    return _plain(model, input_ids=None, inputs_embeds=embeds.double())


def _additive(heads: int) -> Callable[[Any], Any]:
    """An additive mask of four dimensions, causal, of one head for all or one each."""

    def call(model: Any) -> Any:
        count = model.config.num_attention_heads if heads else 1
        bias = torch.randn(2, count, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)).double()
        causal = torch.full((LENGTH, LENGTH), -1e30, dtype=torch.float64).triu(1)
        return _plain(model, attention_mask=bias + causal)

    return call


def _cached(model: Any) -> list[Any]:
    """Three calls that hand their cache on."""
    outputs, cache = [], None
    for begin, end in ((0, 3), (3, 4), (4, 6)):
        output = model(input_ids=IDS[:, begin:end], use_cache=True, **{cache_argument(model): cache})
        cache = cache_of(output)
        assert cache.get_seq_length() == end
        outputs.append({"logits": output.logits})
    return outputs


def _given_cache(model: Any) -> list[Any]:
    """A cache of the caller's, which one call fills and the next extends."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    first = model(input_ids=IDS[:, :4], **{cache_argument(model): cache})
    assert cache.get_seq_length() == 4
    second = model(input_ids=IDS[:, 4:], **{cache_argument(model): cache})
    return [{"logits": first.logits}, {"logits": second.logits}]


def _static_cache(model: Any) -> list[Any]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=8)
    first = model(input_ids=IDS[:, :4], **{cache_argument(model): cache})
    second = model(input_ids=IDS[:, 4:], **{cache_argument(model): cache})
    return [{"logits": first.logits}, {"logits": second.logits}]


REQUESTS: dict[str, Callable[[Any], Any]] = {
    "attentions": asking(output_attentions=True),
    "hidden states": asking(output_hidden_states=True),
    "router logits": asking(output_router_logits=True),
    "a router's loss": asking(output_router_logits=True, labels=IDS.masked_fill(MASK == 0, -100)),
    "everything": asking(output_attentions=True, output_hidden_states=True, use_cache=False),
    "some hidden states": asking(output_hidden_states=[0, -1]),
    "a tuple": asking(return_dict=False),
    "a tuple of everything": asking(output_attentions=True, output_hidden_states=True, return_dict=False),
    "the last logits": asking(logits_to_keep=1),
    "chosen logits": asking(logits_to_keep=torch.tensor([1, 4])),
    "embeddings": _embeds,
    "no mask": asking(attention_mask=None),
    "an additive mask": _additive(0),
    "a mask of each head": _additive(1),
    "positions": asking(position_ids=torch.arange(3, 3 + LENGTH).expand(2, -1)),
    "labels": asking(labels=IDS.masked_fill(MASK == 0, -100)),
    "labels of a larger batch": asking(labels=IDS.masked_fill(MASK == 0, -100), num_items_in_batch=torch.tensor(37)),
    "a returned cache": _cached,
    "a given cache": _given_cache,
    "a static cache": _static_cache,
}


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of an output by its place; caches, whose form is a rank's own, are left out."""
    from transformers.cache_utils import Cache

    if isinstance(value, Tensor):
        return {name: value.detach()}
    if isinstance(value, Cache):
        return {}
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        return {}
    return {place: tensor for key, part in items for place, tensor in flat(part, f"{name}.{key}").items()}


def _compared(name: str, where: dict[str, Any], requests: list[str], config: dict[str, Any]) -> dict[str, str]:
    """By request what is wrong with the answer: nothing, a difference, or an error."""
    unsplit, split = pair(name, where, **config)
    found = {}
    for request in requests:
        try:
            with Float64Everywhere(), torch.no_grad():
                expected = flat(REQUESTS[request](unsplit))
        except Exception as error:
            found[request] = f"unsplit: {type(error).__name__}: {error}"
            continue
        try:
            with Float64Everywhere(), torch.no_grad():
                answer = flat(REQUESTS[request](split))
        except Exception as error:
            found[request] = f"{type(error).__name__}: {error}"
            continue
        found[request] = difference(expected, answer)
    return found


def difference(expected: Mapping[str, Tensor], answer: Mapping[str, Tensor]) -> str:
    """The first thing that differs, or nothing."""
    if list(expected) != list(answer):
        return f"has {sorted(set(answer) - set(expected))}, lacks {sorted(set(expected) - set(answer))}"
    for place, tensor in expected.items():
        if tensor.shape != answer[place].shape or tensor.dtype != answer[place].dtype:
            return f"{place} is {tuple(answer[place].shape)} {answer[place].dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
        if tensor.isnan().any():
            return f"{place} holds NaN, unsplit"
        if not torch.equal(tensor.isinf(), answer[place].isinf()):
            return f"{place} is infinite elsewhere"
        # Scores of tokens that are not sampled are minus infinity.
        finite, mine = (t.double().masked_fill(t.isinf(), 0) for t in (tensor, answer[place]))
        error = float((finite - mine).abs().max() / finite.abs().max().clamp_min(1e-30))
        if not error <= EXACT:
            return f"{place} differs by {error:.1e}"
    return ""


OF_LANGUAGE_MODELS = [name for name in REQUESTS if "router" not in name]
BATCHED = [name for name in OF_LANGUAGE_MODELS if "cache" not in name]
MASKED = [name for name in OF_LANGUAGE_MODELS if name not in ("an additive mask", "a mask of each head")]
CASES: dict[str, list[str]] = {
    "llama-7-heads-1-kv": OF_LANGUAGE_MODELS, "qwen3": OF_LANGUAGE_MODELS, "gpt2": OF_LANGUAGE_MODELS,
    "gpt-neox": OF_LANGUAGE_MODELS, "gemma2": OF_LANGUAGE_MODELS, "gemma3-mixed": OF_LANGUAGE_MODELS,
    "mixtral": list(REQUESTS), "qwen3-moe": list(REQUESTS), "deepseek-v3": OF_LANGUAGE_MODELS, "opt": MASKED,
    "bert": BATCHED, "bert-masked-lm": BATCHED, "falcon": OF_LANGUAGE_MODELS, "bloom": MASKED, "mpt": OF_LANGUAGE_MODELS,
    "bart": BATCHED,
}  # fmt: skip
"""By family what it takes: OPT and BLOOM make positions of the mask, BERT and BART have no cache of a causal model."""

TP = {"tp": 2}
COPIED = {"tp": 3}
"""Three ranks have 3, 2 and 2 of seven heads, and a copy each of one KV head."""


PP = {"pp": 2}
BOTH = {"pp": 2, "tp": 2}
TWICE = {"pp": 2, "vpp": 2}
EMPTY = {"pp": 3, "layout": "Ett||ttL"}
ALONE = {"pp": 2, "layout": "E|ttttL"}
LAST = {"pp": 2, "layout": "EttttL|"}

UNRECORDED = ("falcon", "bloom", "mpt")
"""Families that pass what is asked of every layer from layer to layer themselves."""


def refusal(name: str, where: dict[str, Any], request: str) -> str:
    """How the error begins that a request gets, or nothing where it is answered."""
    if "pp" not in where:
        return ""
    if request == "a static cache":
        return "ModelError: a cache of Static"
    if "vpp" in where and "cache" in request:
        return (
            "ModelError: use_cache=True would share"
            if request == "a returned cache"
            else "ModelError: cache=... would share"
        )
    asks_layers = request in (
        "attentions",
        "hidden states",
        "everything",
        "some hidden states",
        "a tuple of everything",
    )
    return "ModelError: output_" if name in UNRECORDED and asks_layers else ""


def check(name: str, where: dict[str, Any], requests: list[str], **config: Any) -> None:
    size = where.get("tp", 1) * where.get("pp", 1)
    for found in ranks(size).run(_compared, name, where, requests, config):
        for request in requests:
            expected = refusal(name, where, request)
            assert found[request].startswith(expected), (name, request, found[request])
            assert bool(found[request]) == bool(expected), (name, request, found[request])


FAST = ("llama-7-heads-1-kv", "gpt2", "mixtral")
CAUSAL = [name for name in CASES if name != "bart"]
"""Encoders with decoders are not split into stages."""


@pytest.mark.parametrize("where", [TP, PP], ids=["tp", "pp"])
@pytest.mark.parametrize("name", FAST)
def test_every_request_is_answered(name: str, where: dict[str, Any]) -> None:
    check(name, where, CASES[name])


def test_a_family_that_records_nothing_is_refused() -> None:
    check("falcon", PP, ["attentions", "hidden states", "a returned cache"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("where", [TP, COPIED], ids=["tp", "copied"])
def test_tensor_ranks_of_every_family_answer(name: str, where: dict[str, Any]) -> None:
    check(name, where, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("where", [PP, BOTH], ids=["pp", "both"])
def test_stages_of_every_family_answer(name: str, where: dict[str, Any]) -> None:
    check(name, where, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("where", [TWICE, EMPTY, ALONE, LAST], ids=["twice", "empty", "alone", "last"])
@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "mixtral", "gemma3-mixed"])
def test_stages_of_every_layout_answer(name: str, where: dict[str, Any]) -> None:
    check(name, where, CASES[name])


@pytest.mark.parametrize("where", [TP, PP], ids=["tp", "pp"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-7-heads-1-kv", {"output_attentions": True, "output_hidden_states": True}),
        ("bert", {"output_attentions": True, "return_dict": False}),
        ("llama-7-heads-1-kv", {"attention": "sdpa"}),
    ],
)
def test_what_the_config_asks_for(name: str, config: dict[str, Any], where: dict[str, Any]) -> None:
    check(name, where, ["no mask", "attentions"], **config)


def _generated(name: str, where: dict[str, Any], options: dict[str, Any]) -> str:
    """What is wrong with what transformers' own `generate` returns along with the tokens."""
    asked = dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), True)
    found = []
    for model in pair(name, where):
        torch.manual_seed(3)
        with Float64Everywhere():
            output = model.generate(  # type: ignore[operator]
                IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, pad_token_id=0, eos_token_id=None,
                return_dict_in_generate=True, **asked, **options,
            )  # fmt: skip
        assert len(output.scores) == 4
        assert len(output["attentions" if "attentions" in output else "cross_attentions"]) == 4
        found.append(flat(output))
    return difference(*found)


GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.mark.parametrize("where", [TP, PP], ids=["tp", "pp"])
def test_generate_returns_what_is_asked_along_with_the_tokens(where: dict[str, Any]) -> None:
    assert ranks(2).run(_generated, "llama-7-heads-1-kv", where, GREEDY) == [""] * 2


@pytest.mark.slow
@pytest.mark.parametrize("where", [TP, PP, BOTH], ids=["tp", "pp", "both"])
@pytest.mark.parametrize("name", ["gemma3-mixed", "mixtral", "gpt2", "bart"])
@pytest.mark.parametrize("options", [GREEDY, {"do_sample": True}, {"num_beams": 2, "do_sample": False}])
def test_generate_of_more_families_returns_what_is_asked(
    name: str, where: dict[str, Any], options: dict[str, Any]
) -> None:
    if name == "bart" and "pp" in where:
        pytest.skip("encoders with decoders are not split into stages")
    size = where.get("tp", 1) * where.get("pp", 1)
    assert ranks(size).run(_generated, name, where, options) == [""] * size


def test_a_static_cache_over_tensor_ranks() -> None:
    assert ranks(2).run(_generated, "gemma3-mixed", TP, {**GREEDY, "cache_implementation": "static"}) == [""] * 2
