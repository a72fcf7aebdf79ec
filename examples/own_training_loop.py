"""Train a split model in your own loop with an optimizer of torch, clip its gradients, and save it unsplit.

torchrun --nproc-per-node 2 examples/own_training_loop.py runs/own                  # a tiny new model
torchrun --nproc-per-node 2 examples/own_training_loop.py runs/own ./model
"""

import sys

import torch

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
STEPS, BATCH, LENGTH = 20, 8, 32

ranks = pt.join()  # the ranks of the launcher, or this process alone

out = sys.argv[1]
if len(sys.argv) > 2:
    model, tokenizer = pt.load(sys.argv[2], tp=ranks), pt.load_tokenizer(sys.argv[2])
else:
    model, tokenizer = pt.fresh(TINY, tp=ranks, seed=0), pt.byte_tokenizer()

_, groups = pt.plan_of(model)
tokens = pt.load_tokens("stdlib", tokenizer, limit_bytes=100_000)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
rows = torch.Generator().manual_seed(0)  # every tensor rank must see the same rows

model.train()
for step in range(1, STEPS + 1):
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=rows)
    ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
    ids = ids.to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids).loss  # the same on every rank
    loss.backward()
    # After backward() the gradient of each rank's part is that part of the unsplit gradient. torch's function returns the norm
    # of the unsplit gradient on every rank.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if groups.rank == 0 and step in (1, STEPS // 2, STEPS):
        print(f"step {step}: loss {loss.item():.4f}")

model.eval()
pt.save(model, out, tokenizer=tokenizer)  # AutoModelForCausalLM.from_pretrained reads it
if groups.rank == 0:
    print(f"saved to {out}")
