"""Generate text with MLX, with a model that is split over tensor parallel ranks.

mpirun -n 2 python examples/mlx_generate.py                # a tiny new model, which writes nonsense
mlx.launch -n 2 -- python examples/mlx_generate.py ./model "Once upon a time"
"""

import sys

import partita.mlx as pm
from partita.generation import byte_tokenizer, load_tokenizer

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip

world = pm.init()  # the ranks of the launcher, or this process alone

if len(sys.argv) > 1:
    model, tokenizer = pm.load(sys.argv[1], tp=world.size), load_tokenizer(sys.argv[1])
else:
    model, tokenizer = pm.fresh(TINY, tp=world.size, seed=0), byte_tokenizer()
texts = sys.argv[2:] or ["Once upon a time", "The quick brown fox"]

# Every rank calls generate with the same arguments, and every rank returns the same tokens.
generations = pm.generate(
    model, [tokenizer.encode(text) for text in texts], pm.Sampling(max_new_tokens=8), tokenizer=tokenizer
)
if world.rank == 0:
    for text, generation in zip(texts, generations, strict=True):
        print(f"{text!r} -> {generation.text!r}, ended by {generation.finish_reason}")
