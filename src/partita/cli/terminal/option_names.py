"""The names of options in errors of the library, which name the arguments of its functions."""

from __future__ import annotations

import re

_SIZES = "dp|pp|tp|cp|ep|etp|vpp"
_VALUE = re.compile(rf"(?<![\w./=-])({_SIZES})=(?=\d)")
_PRODUCT = re.compile(r"(?<![\w./=-])pp x vpp=(?=\d)")
_RULE = re.compile(rf"^({_SIZES})(?= must be )")
_MEGATRON = re.compile(r"`?\b(pipeline_model_parallel_size|virtual_pipeline_model_parallel_size)\b(`|=(?=\d))?")
_OPTIONS = {"pipeline_model_parallel_size": "--pp", "virtual_pipeline_model_parallel_size": "--vpp"}


def as_options(message: str) -> str:
    """An error of the library in the words of the command line: `--pp 4` for `pp=4` and for Megatron-LM's argument."""
    message = _PRODUCT.sub("--pp x --vpp = ", message)
    message = _VALUE.sub(r"--\1 ", message.replace("tp and pp=", "--tp and pp="))
    message = message.replace("clip_norm", "--grad-clip")
    message = _RULE.sub(r"--\1", message)
    return _MEGATRON.sub(lambda match: _OPTIONS[match[1]] + (" " if match[2] == "=" else ""), message)
