from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.models import TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("faults") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{k: v for k, v in TINY.items() if k not in ("architectures", "model_type", "dtype")}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
