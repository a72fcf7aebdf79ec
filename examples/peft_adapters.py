"""Train peft's DoRA adapters and the head of a split model in your own loop, and save them for peft on the unsplit model.

torchrun --nproc-per-node 2 examples/peft_adapters.py runs/adapters                  # a tiny new model
torchrun --nproc-per-node 2 examples/peft_adapters.py runs/adapters ./model
"""

import sys

import torch
from peft import LoraConfig, get_peft_model

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
STEPS, BATCH, LENGTH = 10, 8, 32

ranks = pt.join()  # the ranks of the launcher, or this process alone

out = sys.argv[1]
if len(sys.argv) > 2:
    model, tokenizer = pt.load(sys.argv[2], tp=ranks), pt.load_tokenizer(sys.argv[2])
else:
    model, tokenizer = pt.fresh(TINY, tp=ranks, seed=0), pt.byte_tokenizer()

_, groups = pt.plan_of(model)
torch.manual_seed(0)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True, modules_to_save=["lm_head"])
adapted = get_peft_model(model, config)  # the adapters that the same seed gives the unsplit model
tokens = pt.load_tokens("stdlib", tokenizer, limit_bytes=100_000)
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
rows = torch.Generator().manual_seed(0)  # every tensor rank must see the same rows

adapted.train()
for step in range(1, STEPS + 1):
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=rows)
    ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
    ids = ids.to(next(model.parameters()).device)
    loss = adapted(input_ids=ids, labels=ids).loss  # the same on every rank
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if groups.rank == 0 and step in (1, STEPS):
        print(f"step {step}: loss {loss.item():.4f}")

adapted.save_pretrained(out)  # every rank writes its part; PeftModel.from_pretrained reads it
if groups.rank == 0:
    print(f"saved to {out}")
