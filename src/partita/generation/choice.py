"""The settings for choosing tokens: the caller's merged with the model's own, as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partita.errors import ModelError, PlanError
from partita.generation.generation_config import REFUSED, REFUSED_SAMPLING, end_tokens
from partita.generation.settings import RULES, Sampling

DEFAULT_NEW_TOKENS = 64
"""The number of new tokens if neither the caller nor the model sets a limit."""

DEFAULT_TOP_K = 50
"""transformers' default `top_k` when sampling."""


@dataclass(frozen=True)
class Choice:
    """The settings for choosing the next token. `Sampling` documents the shared fields.

    Attributes:
        max_new_tokens: Largest number of new tokens; None if `max_length` limits the sequence.
        max_length: Largest number of tokens of prompt and text together.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens.
        min_p: 0 for all tokens.
        repetition_penalty: 1 for none.
        no_repeat_ngram_size: 0 for none.
        bad_words_ids: Sequences of ids that must not appear.
        suppress_tokens: Ids that are never chosen.
        begin_suppress_tokens: Ids that are not chosen as the first new token.
        forced_bos_token_id: The token after a prompt of one token.
        forced_eos_token_ids: The allowed last tokens of a sequence that reaches its limit.
        min_new_tokens: Least number of new tokens.
        min_length: Least number of tokens of prompt and text together.
        eos_ids: Ids that end a sequence.
        seed: Sampling seed.
        stop: A sequence ends before the first of these texts.
        presence_penalty: 0 for none.
        frequency_penalty: 0 for none.
        penalty_window: 0 for all tokens.
        logit_bias: Ids, and the values added to their logits.
        xtc_probability: 0 for none.
        xtc_threshold: See `Sampling`.
    """

    max_new_tokens: int | None = DEFAULT_NEW_TOKENS
    max_length: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is chosen from unchanged logits."""
        changes = (
            self.no_repeat_ngram_size, self.bad_words_ids, self.suppress_tokens, self.begin_suppress_tokens,
            self.forced_bos_token_id is not None, self.forced_eos_token_ids, self.min_new_tokens, self.min_length,
            self.presence_penalty, self.frequency_penalty, self.logit_bias,
        )  # fmt: skip
        return self.temperature == 0 and self.repetition_penalty == 1.0 and not any(changes)

    def limit(self, prompt_length: int) -> int:
        """The largest number of tokens after a prompt of `prompt_length` tokens.

        Raises:
            PlanError: The model's `max_length` is not longer than the prompt.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if prompt_length >= self.max_length:
            raise PlanError(
                f"the model's generation config has max_length={self.max_length}, and a prompt of {prompt_length} tokens "
                "leaves no room for more. Give max_new_tokens (--max-new-tokens)."
            )
        return self.max_length - prompt_length

    def banned(self, prompt: list[int], tokens: list[int]) -> set[int]:
        """The ids that must not come next."""
        seen = prompt + tokens
        banned = set(self.suppress_tokens)
        if not tokens:
            banned.update(self.begin_suppress_tokens)
        if len(tokens) < self.min_new_tokens or len(seen) < self.min_length:
            banned |= self.eos_ids
        for word in self.bad_words_ids:
            if len(word) <= len(seen) + 1 and seen[len(seen) + 1 - len(word) :] == list(word[:-1]):
                banned.add(word[-1])
        size = self.no_repeat_ngram_size
        if 0 < size <= len(seen):
            prefix = seen[len(seen) + 1 - size :]
            starts = range(len(seen) + 1 - size)
            banned.update(seen[i + size - 1] for i in starts if seen[i : i + size - 1] == prefix)
        return banned

    def forced(self, prompt: list[int], tokens: list[int]) -> tuple[int, ...]:
        """The only ids that may come next; empty if all may."""
        if self.forced_eos_token_ids and len(tokens) == self.limit(len(prompt)) - 1:
            return self.forced_eos_token_ids
        if self.forced_bos_token_id is not None and len(prompt) + len(tokens) == 1:
            return (self.forced_bos_token_id,)
        return ()


def settle(sampling: Sampling, generation: Mapping[str, Any], tokenizer_ends: frozenset[int] = frozenset()) -> Choice:
    """Complete `sampling` from the model's generation config, and that from the defaults of transformers.

    Args:
        sampling: The caller's settings, which take precedence.
        generation: The model's settings by transformers' names, without those that are null.
        tokenizer_ends: The tokenizer's end tokens, used if the model names none.

    Raises:
        ModelError: The model has a setting that is not supported, or an invalid value.
    """
    model = generation if sampling.use_generation_config else {}
    samples = model.get("do_sample") is True if sampling.temperature is None else sampling.temperature > 0
    for name, neutral in {**REFUSED, **(REFUSED_SAMPLING if samples else {})}.items():
        if model.get(name) is not None and model[name] not in neutral:
            raise ModelError(
                f"the model's generation config has {name}={model[name]!r:.60}, which is not supported. Leave its "
                "settings out with use_generation_config=False (--no-generation-config)."
            )

    def value(name: str, default: Any) -> Any:
        given = getattr(sampling, name, None)
        if given is not None:
            return given
        found = model.get(name)
        if found is None:
            return default
        found = float(found) if type(found) is int and isinstance(default, float) else found
        if name in RULES and not RULES[name][0](found):
            raise ModelError(f"the model's generation config: {name} must be {RULES[name][1]}, but is {found!r:.60}.")
        return found

    limits = {"max_new_tokens": value("max_new_tokens", None)}
    if limits["max_new_tokens"] is None and model.get("max_length") is not None:
        limits["max_length"] = value("max_length", 0)
    elif limits["max_new_tokens"] is None:
        limits["max_new_tokens"] = DEFAULT_NEW_TOKENS
    filters = {
        "temperature": value("temperature", 1.0), "top_k": value("top_k", DEFAULT_TOP_K), "top_p": value("top_p", 1.0),
        "min_p": value("min_p", 0.0),
    }  # fmt: skip
    if samples and not filters["temperature"] > 0:
        raise ModelError("the model's generation config samples (do_sample) at temperature 0. Give a temperature.")
    eos_ids = frozenset() if sampling.ignore_eos else end_tokens(generation) or tokenizer_ends
    new = value("min_new_tokens", None)
    words = tuple(tuple(word) for word in value("bad_words_ids", ()))
    stop_strings = model.get("stop_strings") or ()
    return Choice(
        **limits,
        **(filters if samples else {}),
        repetition_penalty=value("repetition_penalty", 1.0),
        no_repeat_ngram_size=value("no_repeat_ngram_size", 0),
        bad_words_ids=tuple(word for word in words if len(word) > 1 or word[0] not in eos_ids),
        suppress_tokens=tuple(value("suppress_tokens", ())),
        begin_suppress_tokens=tuple(value("begin_suppress_tokens", ())),
        forced_bos_token_id=model.get("forced_bos_token_id"),
        forced_eos_token_ids=tuple(_ids(model.get("forced_eos_token_id"))) if not sampling.ignore_eos else (),
        min_new_tokens=new if new is not None else 0,
        min_length=value("min_length", 0) if new is None else 0,
        eos_ids=eos_ids,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        penalty_window=sampling.penalty_window,
        logit_bias=tuple(dict(sampling.logit_bias).items()),
        xtc_probability=sampling.xtc_probability if samples else 0.0,
        xtc_threshold=sampling.xtc_threshold,
        stop=sampling.stop or ((stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)),
    )


def _ids(named: Any) -> tuple[int, ...]:
    return () if named is None else (named,) if isinstance(named, int) else tuple(named)
