"""Generate text with a model that is split over tensor parallel ranks.

torchrun --nproc-per-node 2 examples/generate.py                     # a tiny new model, which writes nonsense
torchrun --nproc-per-node 2 examples/generate.py ./model "Once upon a time"
"""

import sys

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float64",
}  # fmt: skip

ranks = pt.join()  # the ranks of the launcher, or this process alone

if len(sys.argv) > 1:
    model, tokenizer = pt.load(sys.argv[1], tp=ranks), pt.load_tokenizer(sys.argv[1])
else:
    model, tokenizer = pt.fresh(TINY, tp=ranks, seed=0), pt.byte_tokenizer()
texts = sys.argv[2:] or ["Once upon a time", "The quick brown fox"]


def show(place: int, text: str) -> None:
    """Print new text as it comes. It is called on the first rank only."""
    print(f"[{place}] {text!r}", flush=True)


# Every rank calls generate with the same arguments, and every rank returns the same tokens.
generations = pt.generate(
    model,
    [tokenizer.encode(text) for text in texts],
    pt.Sampling(max_new_tokens=8, temperature=0.8, top_p=0.95, seed=7),
    tokenizer=tokenizer,
    on_text=show,
)
_, groups = pt.plan_of(model)
if groups.rank == 0:
    for text, generation in zip(texts, generations, strict=True):
        print(f"{text!r} -> {len(generation.tokens)} tokens, ended by {generation.finish_reason}")
