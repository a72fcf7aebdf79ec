"""Rules: a table of path patterns that determines the split of each module of a model over the tensor axis."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from partita.core.model.spec import ModelSpec
from partita.errors import PlanError

Style = Literal["column", "row", "vocab", "embedding", "replicate", "head", "experts"]
Over = Literal["features", "heads", "kv_heads", "qkv", "qkv_by_head", "gate_up", "gate_up_pairs"]

STYLES: tuple[Style, ...] = ("column", "row", "vocab", "embedding", "replicate", "head", "experts")
OVERS: tuple[Over, ...] = ("features", "heads", "kv_heads", "qkv", "qkv_by_head", "gate_up", "gate_up_pairs")


@dataclass(frozen=True)
class Rule:
    """The split of the modules whose path ends with `pattern`.

    Attributes:
        pattern: A dotted path, matched against the end of a module's path (or of a tensor's, for `head`). `*` is any one
            name, `{a,b}` one of several: `layers.*.self_attn.{q,k}_proj`.
        style: `column` and `row` split a linear layer's outputs or inputs; `vocab` splits the vocabulary of an embedding or
            of the head; `embedding` splits an embedding's width; `replicate` copies it to every rank; `head` splits a
            tensor with one row per head; `experts` splits the inner width of fused experts, or distributes them over `ep`.
        over: The contents of the split dimension: plain `features`; query `heads`; `kv_heads`; `qkv` (queries, keys and
            values concatenated); `qkv_by_head` (each head's query, key and value together); `gate_up` (two
            halves, each split); `gate_up_pairs` (experts whose gate and up features alternate).
        gather_output: Whether the outputs of a column layer are gathered after it.
        split_input: Whether a row layer receives its complete input and selects its part of it.
        partial_grad: For `replicate`: whether the tensor is used inside a split region, where each rank sees only its
            part of the gradient, so that the parts are summed.
        copy_output: For `replicate`: the config key with the number of trailing outputs that enter a split region
            (`qk_rope_head_dim` in DeepSeek's latent attention), so that their gradients are summed.
        transposed: Whether the weight is stored as [in, out], as in transformers' Conv1D. For `head`: whether a tensor has one
            column per head instead.
    """

    pattern: str
    style: Style
    over: Over = "features"
    gather_output: bool = False
    split_input: bool = False
    partial_grad: bool = False
    copy_output: str = ""
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise PlanError(
                f"the style of rule {self.pattern!r} must be one of {', '.join(STYLES)}, but is {self.style!r}."
            )
        if self.over not in OVERS:
            raise PlanError(f"`over` of rule {self.pattern!r} must be one of {', '.join(OVERS)}, but is {self.over!r}.")
        _compile(self.pattern)

    def matches(self, path: str) -> bool:
        """Whether `path` ends with the pattern."""
        return _compile(self.pattern).fullmatch(path) is not None


@dataclass(frozen=True)
class Rules:
    """A family's table: the first rule that matches a path applies; modules without a rule are replicated.

    `proven` says that the table was measured equal to the unsplit model for this family; an engine measures any other
    table on a small model of the same family before it uses it.
    """

    table: tuple[Rule, ...]
    proven: bool = False

    @classmethod
    def parse(cls, table: Mapping[str, str]) -> Rules:
        """Rules from `{pattern: "style"}` or `{pattern: "style over option ..."}`, e.g. `"column heads gather_output"`.

        Examples:
            >>> rules = Rules.parse({"attn.{q,k,v}": "column heads", "attn.out": "row heads"})
            >>> rules.find("layers.0.attn.k").style
            'column'
        """
        rules = []
        for pattern, words in table.items():
            style, *rest = str(words).split() or [""]
            over = [word for word in rest if word in OVERS]
            flags = [word for word in rest if word in ("gather_output", "split_input", "partial_grad", "transposed")]
            if len(over) > 1 or len(over) + len(flags) != len(rest):
                raise PlanError(
                    f"rule {pattern!r}: {words!r} must be a style ({', '.join(STYLES)}), then at most one of "
                    f"{', '.join(OVERS)}, then gather_output, split_input, partial_grad or transposed."
                )
            rules.append(Rule(pattern, style, *over, **dict.fromkeys(flags, True)))  # type: ignore[arg-type]
        return cls(tuple(rules))

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; `from_data` reads it back."""
        return {"proven": self.proven, "rules": [asdict(rule) for rule in self.table]}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Rules:
        """The inverse of `to_data`; other keys of `data` are ignored."""
        return cls(tuple(Rule(**rule) for rule in data["rules"]), data["proven"])

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.table)

    def find(self, path: str) -> Rule | None:
        """The rule for module or tensor `path`, or None."""
        return next((rule for rule in self.table if rule.matches(path)), None)


def isolate(rule: Rule) -> Rule:
    """The rule that splits the same module by itself, so that its neighbours see complete tensors."""
    if rule.style == "column":
        return replace(rule, over="features", gather_output=True)
    if rule.style == "row":
        return replace(rule, over="features", split_input=True)
    return replace(rule, style="replicate", partial_grad=False, copy_output="")


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[^{}]*\}|\*)", pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise PlanError(f"the pattern {pattern!r} has a brace without its partner; write {{a,b}} for one of several.")
    text = ""
    for part in parts:
        if part == "*":
            text += r"[^.]+"
        elif part.startswith("{"):
            text += "(?:" + "|".join(re.escape(choice) for choice in part[1:-1].split(",")) + ")"
        else:
            text += re.escape(part)
    return re.compile(r"(?:.*\.)?" + text)


# --- tables -------------------------------------------------------------------------------------------------------------
# Names are those of transformers' and mlx-lm's modules.

VOCABULARY = (
    Rule("{embed_tokens,wte,embed_in,word_embeddings,embeddings,tok_embeddings}", "vocab"),
    Rule("{lm_head,embed_out}", "vocab"),
)
ATTENTION = (
    Rule("{self_attn,attn,attention}.q_proj", "column", "heads"),
    Rule("{self_attn,attn,attention}.{k_proj,v_proj}", "column", "kv_heads"),
    Rule("{self_attn,attn,attention}.{o_proj,out_proj,dense}", "row", "heads"),
    Rule("{self_attn,attn,attention}.{q_norm,k_norm,q_layernorm,k_layernorm}", "replicate", partial_grad=True),
)
MLP = (
    Rule("{gate_proj,up_proj,fc1,c_fc,dense_h_to_4h,fc_in}", "column"),
    Rule("{down_proj,fc2,dense_4h_to_h,fc_out}", "row"),
    Rule("mlp.c_proj", "row"),
    Rule("gate_up_proj", "column", "gate_up"),
)
EXPERTS = (Rule("mlp.experts", "experts"), Rule("block_sparse_moe.experts", "experts"))
LATENT_ATTENTION = (
    Rule("self_attn.q_a_proj", "replicate"),
    Rule("self_attn.{q_b_proj,kv_b_proj,q_proj}", "column", "heads"),
    Rule("self_attn.kv_a_proj_with_mqa", "replicate", copy_output="qk_rope_head_dim"),
    Rule("self_attn.o_proj", "row", "heads"),
)
PACKED_QKV = (Rule("self_attn.qkv_proj", "column", "qkv"),)
CONV1D = (
    Rule("attn.c_attn", "column", "qkv", transposed=True),
    Rule("attn.c_proj", "row", "heads", transposed=True),
    Rule("mlp.c_fc", "column", transposed=True),
    Rule("mlp.c_proj", "row", transposed=True),
)
QKV_BY_HEAD = (
    Rule("{attention,self_attention}.query_key_value", "column", "qkv_by_head"),
    Rule("{attention,self_attention}.dense", "row", "heads"),
)
BERT = (
    Rule("attention.self.{query,key,value}", "column", "heads"),
    Rule("attention.output.dense", "row", "heads"),
    Rule("layer.*.intermediate.dense", "column"),
    Rule("layer.*.output.dense", "row"),
    Rule("{cls.predictions,lm_head}.decoder", "vocab"),
    Rule("embeddings.word_embeddings", "vocab"),
)
ALBERT = (
    Rule("attention.{query,key,value}", "column", "heads"),
    Rule("attention.dense", "row", "heads"),
    Rule("albert_layers.*.ffn", "column"),
    Rule("albert_layers.*.ffn_output", "row"),
    Rule("predictions.decoder", "vocab"),
    Rule("embeddings.word_embeddings", "vocab"),
)
T5 = (
    Rule("{shared,embed_tokens}", "vocab"),
    Rule("lm_head", "vocab"),
    Rule("{SelfAttention,EncDecAttention}.q", "column", "heads"),
    Rule("{SelfAttention,EncDecAttention}.{k,v}", "column", "kv_heads"),
    Rule("{SelfAttention,EncDecAttention}.o", "row", "heads"),
    Rule("{SelfAttention,EncDecAttention}.relative_attention_bias", "head", transposed=True),
    Rule("DenseReluDense.{wi,wi_0,wi_1}", "column"),
    Rule("DenseReluDense.wo", "row"),
)
WIDE_NORMS = (
    # A norm over all heads together needs all of them on each rank.
    Rule("self_attn.{q_proj,k_proj,v_proj}", "column", gather_output=True),
    Rule("self_attn.o_proj", "row", split_input=True),
)

DENSE = VOCABULARY + ATTENTION + MLP
SINKS = (*VOCABULARY, Rule("layers.*.self_attn", "head"), *ATTENTION)
TABLES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3",
         "starcoder2", "cohere", "cohere2", "stablelm", "phi", "nemotron", "olmo", "opt", "helium", "seed_oss",
         "arcee", "glm", "glm4", "codegen_like"),
        DENSE,
    ),
    **dict.fromkeys(("olmo2", "olmo3"), VOCABULARY + WIDE_NORMS + MLP),
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen2_moe", "phimoe", "dots1", "granitemoe"), DENSE + EXPERTS),
    "olmoe": VOCABULARY + WIDE_NORMS + MLP + EXPERTS,
    "gpt_oss": (*SINKS, Rule("mlp.experts", "experts", "gate_up_pairs")),
    "phi3": VOCABULARY + PACKED_QKV + ATTENTION + MLP,
    "gpt2": VOCABULARY + CONV1D,
    "gpt_neox": VOCABULARY + QKV_BY_HEAD + MLP,
    **dict.fromkeys(("bert", "roberta", "electra", "camembert", "xlm-roberta"), BERT),
    "albert": ALBERT,
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), VOCABULARY + LATENT_ATTENTION + MLP + EXPERTS),
}  # fmt: skip

PROVEN: frozenset[str] = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bert",
     "mixtral", "qwen3_moe", "deepseek_v3")
)  # fmt: skip
"""Families whose tables the test-suite measures against the unsplit model, in outputs and every gradient."""

ABSORBED_LATENT_ATTENTION = (
    # mlx-lm stores the two halves of kv_b_proj as one matrix per head, and applies them to the latents themselves.
    Rule("self_attn.q_a_proj", "replicate"),
    Rule("self_attn.{q_b_proj,q_proj}", "column", "heads"),
    Rule("self_attn.kv_a_proj_with_mqa", "replicate", copy_output="qk_rope_head_dim"),
    Rule("self_attn.kv_a_layernorm", "replicate", copy_output="kv_lora_rank"),
    Rule("self_attn.{embed_q,unembed_out}", "head"),
    Rule("self_attn.o_proj", "row", "heads"),
)
ROUTERS = (Rule("{mlp,block_sparse_moe}.{gate,shared_expert_gate}", "replicate"),)
APART = (
    # The operations between these layers need complete tensors.
    Rule("mlp.{gate_proj,up_proj,down_proj}", "column", gather_output=True),
)
MLX_TABLES: Mapping[str, tuple[Rule, ...]] = {
    **TABLES,
    "gpt2": (*VOCABULARY, Rule("attn.c_attn", "column", "qkv"), Rule("attn.c_proj", "row", "heads"), *MLP),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "kimi_k2", "joyai_llm_flash"), VOCABULARY + ABSORBED_LATENT_ATTENTION + MLP
    ),
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen2_moe", "phimoe"), DENSE + ROUTERS),
    "gpt_oss": SINKS + MLP,
    # Its activation keeps the largest elements of a complete row.
    "gemma3n": VOCABULARY + ATTENTION + APART,
    # Its activation has parameters.
    "apertus": (*DENSE, Rule("mlp.act_fn", "replicate", partial_grad=True)),
}  # fmt: skip
"""Tables of mlx-lm's modules, which have transformers' names except for these; stacked experts are linear layers there."""

MLX_USUAL = VOCABULARY + ABSORBED_LATENT_ATTENTION + PACKED_QKV + QKV_BY_HEAD + ATTENTION + MLP
"""Rules for the usual names of mlx-lm's modules."""

MLX_PROVEN: frozenset[str] = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "starcoder2", "olmo2", "mixtral",
     "qwen3_moe", "deepseek_v3")
)  # fmt: skip
"""Families whose tables the test-suite measures on MLX, and which have no flag that could invalidate a table."""

_HF_STYLES: Mapping[str, tuple[Style, dict[str, Any]]] = {
    "colwise": ("column", {}),
    "rowwise": ("row", {}),
    "colwise_rep": ("column", {"gather_output": True}),
    "colwise_gather_output": ("column", {"gather_output": True}),
    "rowwise_rep": ("row", {"split_input": True}),
    "rowwise_split_input": ("row", {"split_input": True}),
    "embedding_rowwise": ("vocab", {}),
    "embedding_colwise": ("embedding", {}),
    "moe_tp_experts": ("experts", {}),
    "replicate": ("replicate", {}),
    "replicated_with_grad_allreduce": ("replicate", {"partial_grad": True}),
}
_HF_OVER: Mapping[str, Over] = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "query", "o_proj", "out_proj", "dense", "wo"), "heads"),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value"), "kv_heads"),
    "qkv_proj": "qkv", "gate_up_proj": "gate_up",
}  # fmt: skip


def rules_from_tp_plan(tp_plan: Mapping[str, str]) -> Rules:
    """Rules from a Hugging Face config's `base_model_tp_plan`; its styles without an equivalent are left out.

    Facts that the plan omits (whether a column layer's outputs are heads) are inferred from the module's name, so such
    rules are not `proven`: an engine measures them first.
    """
    rules = []
    for pattern, style in tp_plan.items():
        if style == "mla_kv_a_proj":
            rules.append(Rule(pattern, "replicate", copy_output="qk_rope_head_dim"))
        elif style in _HF_STYLES and not (".experts." in pattern and style in ("rowwise", "packed_colwise")):
            ours, flags = _HF_STYLES[style]
            tail = pattern.rpartition(".")[2]
            attends = re.search(r"(attn|attention)", pattern) is not None
            over: Over = _HF_OVER.get(tail, "features") if attends or tail == "gate_up_proj" else "features"
            rules.append(replace(Rule(pattern, ours, "features" if flags else over), **flags))
    # Some plans omit that a norm of each head sees only the gradients of a rank's own heads.
    splits_heads = any(rule.style == "column" and rule.over == "heads" and not rule.gather_output for rule in rules)
    norms = [rule for rule in ATTENTION if rule.partial_grad] if splits_heads else []
    return Rules((*rules, *norms, *VOCABULARY))


def rules_for(
    spec: ModelSpec,
    tp_plan: Mapping[str, str] | None = None,
    *,
    tables: Mapping[str, tuple[Rule, ...]] = TABLES,
    proven: frozenset[str] = PROVEN,
    usual: tuple[Rule, ...] = DENSE + EXPERTS,
) -> Rules:
    """The table of a model: our own for its family, else Hugging Face's plan, else that for the usual names."""
    if spec.family in tables:
        rules = Rules(tables[spec.family])
        # The tests have not measured a linear layer without a rule, such as cross-attention.
        known = all(rules.find(path) for path in spec.linears or () if spec.layer_of(path) is not None)
        return replace(rules, proven=known and spec.family in proven)
    if tp_plan:
        return rules_from_tp_plan(tp_plan)
    return Rules(usual)


def isolated_rules(spec: ModelSpec) -> Rules:
    """Split every linear layer inside the model's layers by itself, for a model that is otherwise unknown.

    The modules between see complete tensors, so that their results are correct. It costs more communication.
    """
    inside = sorted(path for path in spec.linears or () if spec.layer_of(path) is not None)
    return Rules((*VOCABULARY, *(Rule(path, "column", gather_output=True) for path in inside)))


def without_vocabulary(rules: Rules) -> Rules:
    """`rules` with a replicated embedding and head, for a model that uses an embedding's weight directly."""
    return Rules(tuple(rule for rule in rules if rule.style != "vocab"))


def partly_isolated_rules(spec: ModelSpec, rules: Rules, *, attention: bool) -> Rules:
    """`rules`, but the linear layers inside attentions (or else those outside) are each split by itself.

    All other tensors in these parts of the layers are replicated.
    """
    apart = [
        Rule(path, "column", gather_output=True) if path in (spec.linears or ()) else Rule(path, "replicate")
        for path in spec.modules
        if spec.layer_of(path) is not None and (_ATTENTION.search(path) is not None) == attention
    ]
    return Rules((*apart, *rules.table))


_ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention)([._]|$)|mixer|token_mix")
