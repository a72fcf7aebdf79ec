"""Encoders of BERT's kind. Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import Architecture, Build, Family, one_each
from partita.core.model.families.parts import Parts, embedding, linear, norm, parameter, plain_mlp, stack, within

BASE = sizes(30522, 768, 3072, 12, 12, max_position_embeddings=512, type_vocab_size=2, tie_word_embeddings=True)


def layer_norm(c: Config, path: str = "LayerNorm") -> Parts:
    """A layer norm of the hidden states."""
    return norm(path, c.hidden, bias=True)


def square(c: Config, path: str) -> Parts:
    """A linear layer from hidden states to hidden states."""
    return linear(path, c.hidden, c.hidden, bias=True)


def bert_layer(c: Config) -> Parts:
    """Attention and MLP, each with its norm behind it."""
    return [
        *within("attention.self", square(c, "query"), square(c, "key"), square(c, "value")),
        *within("attention.output", square(c, "dense"), layer_norm(c)),
        *linear("intermediate.dense", c.hidden, c.inner, bias=True),
        *within("output", linear("dense", c.inner, c.hidden, bias=True), layer_norm(c)),
    ]


def bert(c: Config, pooler: bool = True) -> Parts:
    """BERT."""
    return within("embeddings", words(c), positions(c), types(c), layer_norm(c)) + bert_rest(c, pooler)


def roberta(c: Config, pooler: bool = True) -> Parts:
    """RoBERTa: BERT, but for an order."""
    return within("embeddings", words(c), types(c), layer_norm(c), positions(c)) + bert_rest(c, pooler)


def bert_rest(c: Config, pooler: bool) -> Parts:
    """The layers and, where asked, what makes one vector of a text."""
    return stack("encoder.layer", [bert_layer(c)] * c.layers) + (square(c, "pooler.dense") if pooler else [])


def distilbert(c: Config) -> Parts:
    """DistilBERT: BERT without token types and pooler."""
    layer = [
        *within("attention", *(square(c, path) for path in ("q_lin", "k_lin", "v_lin", "out_lin"))),
        *layer_norm(c, "sa_layer_norm"),
        *plain_mlp(c, c.inner, "lin1", "lin2", bias=True, path="ffn"),
        *layer_norm(c, "output_layer_norm"),
    ]
    embeddings = within("embeddings", words(c), positions(c), layer_norm(c))
    return embeddings + stack("transformer.layer", [layer] * c.layers)


def words(c: Config) -> Parts:
    """Word embedding [V, H]."""
    return embedding("word_embeddings", c.vocab, c.hidden)


def positions(c: Config) -> Parts:
    """Learned positions."""
    return embedding("position_embeddings", c.size("max_position_embeddings"), c.hidden)


def types(c: Config) -> Parts:
    """Which of two texts a token is of."""
    return embedding("token_type_embeddings", c.size("type_vocab_size"), c.hidden)


def bert_predictions(c: Config) -> Parts:
    """BERT's head of a masked language model [V, H]; the bias of its own is the decoder's."""
    return within(
        "cls.predictions",
        parameter("bias", c.vocab),
        within("transform", square(c, "dense"), layer_norm(c)),
        linear("decoder", c.hidden, c.vocab, bias=True),
    )


def roberta_predictions(c: Config) -> Parts:
    """RoBERTa's."""
    return within(
        "lm_head",
        parameter("bias", c.vocab),
        square(c, "dense"),
        layer_norm(c, "layer_norm"),
        linear("decoder", c.hidden, c.vocab, bias=True),
    )


def distilbert_predictions(c: Config) -> Parts:
    """DistilBERT's."""
    return [
        *square(c, "vocab_transform"),
        *layer_norm(c, "vocab_layer_norm"),
        *linear("vocab_projector", c.hidden, c.vocab, bias=True),
    ]


def labels(c: Config, path: str = "classifier") -> Parts:
    """A linear layer that gives each label a score."""
    return linear(path, c.hidden, c.labels, bias=True)


def around(path: str, layers: str, base: Build, head: Build, tied: Mapping[str, str] | None = None) -> Architecture:
    """A class that holds `base` under `path`, and then `head`."""
    return Architecture(lambda c: within(path, base(c)) + head(c), f"{path}.{layers}", tied or {})


def bert_family() -> Family:
    """BERT's classes."""

    def bare(c: Config) -> Parts:
        return bert(c, pooler=False)

    def pretraining(c: Config) -> Parts:
        return bert_predictions(c) + linear("cls.seq_relationship", c.hidden, 2, bias=True)

    at = partial(around, "bert", "encoder.layer")
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    architectures = {
        "BertForMaskedLM": at(bare, bert_predictions, tied),
        "BertLMHeadModel": at(bare, bert_predictions, tied),
        "BertForPreTraining": at(bert, pretraining, tied),
        "BertModel": Architecture(bert, "encoder.layer"),
        "BertForSequenceClassification": at(bert, labels),
        "BertForTokenClassification": at(bare, labels),
        "BertForQuestionAnswering": at(bare, partial(labels, path="qa_outputs")),
    }
    return Family(architectures, BASE, kv_heads=one_each, even_heads=True)


def roberta_family() -> Family:
    """RoBERTa's classes."""

    def bare(c: Config) -> Parts:
        return roberta(c, pooler=False)

    def classifier(c: Config) -> Parts:
        return within("classifier", square(c, "dense"), labels(c, "out_proj"))

    at = partial(around, "roberta", "encoder.layer")
    tied = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    architectures = {
        "RobertaForMaskedLM": at(bare, roberta_predictions, tied),
        "RobertaForCausalLM": at(bare, roberta_predictions, tied),
        "RobertaModel": Architecture(roberta, "encoder.layer"),
        "RobertaForSequenceClassification": at(bare, classifier),
        "RobertaForTokenClassification": at(bare, labels),
        "RobertaForQuestionAnswering": at(bare, partial(labels, path="qa_outputs")),
    }
    return Family(architectures, BASE | {"vocab_size": 50265}, kv_heads=one_each, even_heads=True)


def distilbert_family() -> Family:
    """DistilBERT's classes."""

    def classifier(c: Config) -> Parts:
        return square(c, "pre_classifier") + labels(c)

    at = partial(around, "distilbert", "transformer.layer", distilbert)
    tied = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    architectures = {
        "DistilBertForMaskedLM": at(distilbert_predictions, tied),
        "DistilBertModel": Architecture(distilbert, "transformer.layer"),
        "DistilBertForSequenceClassification": at(classifier),
        "DistilBertForTokenClassification": at(labels),
        "DistilBertForQuestionAnswering": at(partial(labels, path="qa_outputs")),
    }
    aliases = {
        "hidden_size": ("hidden_size", "dim"),
        "num_hidden_layers": ("num_hidden_layers", "n_layers"),
        "num_attention_heads": ("num_attention_heads", "n_heads"),
        "intermediate_size": ("hidden_dim",),
    }
    return Family(architectures, BASE | {"num_hidden_layers": 6}, aliases, one_each, even_heads=True)


FAMILIES = {
    "bert": bert_family(),
    "roberta": roberta_family(),
    "distilbert": distilbert_family(),
}
