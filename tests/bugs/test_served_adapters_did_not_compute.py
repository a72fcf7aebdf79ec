"""Served adapters had no effect where a faster form of a layer is used for new tokens: it kept the layers that they replace."""

from __future__ import annotations

from pathlib import Path

import torch

from partita.generation import Sampling
from partita.serving import ServeRequest
from partita.torch import add_lora, load_adapters, save_adapters
from partita.torch.serving import serving_loop
from partita.torch.transformers_internals import quiet
from tests.support.serving import alone, served, split_model, unsplit_model


def test_layers_in_c_take_the_adapters_of_a_request(tmp_path: Path) -> None:
    with quiet():
        unsplit = unsplit_model("llama", {}, torch.float32)
    adapted = split_model(unsplit, {})
    add_lora(adapted, 2, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.5)
    save_adapters(adapted, tmp_path / "one")
    references = {"": split_model(unsplit, {}), "one": split_model(unsplit, {})}
    load_adapters(references["one"], tmp_path / "one")
    requests = [
        ServeRequest(number, tuple(b"Once"), Sampling(8, use_generation_config=False), adapter=name)
        for number, name in enumerate(("", "one", ""))
    ]
    heard = served(serving_loop(split_model(unsplit, {}), adapters={"one": tmp_path / "one"}), requests)
    expected = [alone(references[request.adapter], request)[0] for request in requests]
    assert [heard[request.id].tokens for request in requests] == expected
    assert expected[0] != expected[1]
