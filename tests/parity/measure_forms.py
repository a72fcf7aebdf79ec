"""Writes `src/partita/mlx/proof/measured_forms.json`: `python -m tests.parity.measure_forms [FAMILY ...]`.

Each form is measured once for a version of mlx-lm; what is measured already stays. Remove the file to begin again.
"""

from __future__ import annotations

import json
import multiprocessing
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import Any

import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from partita.mlx.model.config import plain_numbers, read_mlx_config, transformers_config
from partita.mlx.proof.forms import Verdict, form_name, form_of, versions
from tests.mlx.test_models import MODELS
from tests.support.mlx_models import tiny_config
from tests.support.models import CONFIGS, UNMEASURED

FILE = Path(__file__).parents[2] / "src" / "partita" / "mlx" / "proof" / "measured_forms.json"
LIMIT_S = 240.0

ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn, attention_factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.2,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Forms that published models have."""

PUBLISHED: list[dict[str, Any]] = [
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "llama", "attention_bias": True},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "tie_word_embeddings": True},
    {"model_type": "qwen3_moe", "head_dim": 128, "norm_topk_prob": True},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "phi3", "sliding_window": None},
    {"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
     "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 9 for i in range(48)],
                         "long_factor": [1.0 + i for i in range(48)]}},
    {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True},
    {"model_type": "stablelm", "use_qkv_bias": True},
    {"model_type": "gpt_oss", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}},
    {"model_type": "glm4_moe", "use_qk_norm": True, "attention_bias": True},
    {"model_type": "starcoder2", "hidden_act": "gelu"},
    {"model_type": "gpt_neox", "hidden_act": "gelu_new"},
    {"model_type": "deepseek_v3", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}},
    {"model_type": "gemma2", "sliding_window": 4096},
    {"model_type": "cohere2", "sliding_window": 4096},
]  # fmt: skip
"""What configs of published models have otherwise than their family's defaults."""


def configs(families: list[str]) -> Iterator[dict[str, Any]]:
    """The forms to be measured, as configs."""
    modules = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    causal = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family in CONFIG_MAPPING]
    known = [family for family in causal if MODEL_REMAPPING.get(family, family) in modules]
    for family in sorted(known):
        if families and family not in families:
            continue
        yield {"model_type": family}
        for one in (*CONFIGS.values(), *UNMEASURED.values(), *PUBLISHED, *_of_tests()):
            if one["model_type"] == family:
                yield {key: value for key, value in one.items() if key != "architectures"}
    for family in sorted(known):
        usual = _usual(family)
        rotary = usual.get("rope_parameters")
        if (families and family not in families) or not isinstance(rotary, Mapping) or "rope_theta" not in rotary:
            continue
        shared = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
        for form in ROTARY.values():
            yield {"model_type": family, "rope_parameters": {**shared, **form}}


def _of_tests() -> Iterator[dict[str, Any]]:
    for family, changes in MODELS.values():
        yield {**tiny_config(family), **changes}
        yield {**tiny_config(family), "tie_word_embeddings": True}


def _usual(family: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    except Exception:
        return {}
    return data


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a form, in a process of its own."""
    from transformers.utils import logging

    from partita.parity import compare_with_transformers

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    known = transformers_config(read_mlx_config(config))
    whole = plain_numbers(json.loads(known.to_json_string(use_diff=False)))
    whole.pop("quantization_config", None)
    return compare_with_transformers(whole).to_json()


def main() -> None:
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    if table.get("versions") != versions():
        table = {"versions": versions(), "families": {}}
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    for config in configs(sys.argv[1:]):
        form = form_of(read_mlx_config(config))
        if form is None:
            continue
        forms = table["families"].setdefault(config["model_type"], {})
        name = form_name(form)
        if name in forms:
            continue
        try:
            forms[name] = pool.submit(measure, config).result(LIMIT_S)
        except (OutOfTime, OSError, RuntimeError) as error:
            forms[name] = Verdict(None, reason=f"the comparison did not end ({type(error).__name__}).").to_json()
            for process in list(pool._processes.values()):
                process.kill()
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        print(config["model_type"], name or "-", forms[name], flush=True)
        if forms[name]["error"] is None:
            # What cannot be measured here may be with a config of other sizes.
            del forms[name]
            continue
        forms[name]["error"] = float(f"{forms[name]['error']:.1e}")
        table["families"] = {family: table["families"][family] for family in sorted(table["families"])}
        FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
