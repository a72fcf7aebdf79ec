"""A loop of torch's own parts around a split model: replicas, accumulated gradients, clipping, a scheduler, averaged weights.

torchrun --nproc-per-node 2 examples/own_loop.py runs/own-loop                      # tp 2
torchrun --nproc-per-node 4 examples/own_loop.py runs/own-loop ./model              # tp 2 x dp 2
"""

import sys
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
LENGTH, PARTS, STEPS = 32, 2, 16

ranks = pt.join()  # the ranks of the launcher, or this process alone
tp = min(ranks, 2)
mesh = {"tp": tp, "dp": ranks // tp}
out = sys.argv[1]
if len(sys.argv) > 2:
    model, tokenizer = pt.load(sys.argv[2], **mesh), pt.load_tokenizer(sys.argv[2])
else:
    model, tokenizer = pt.fresh(TINY, seed=0, **mesh), pt.byte_tokenizer()
_, groups = pt.plan_of(model)

tokens = pt.load_tokens("stdlib", tokenizer, limit_bytes=100_000)
rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
# The ranks of tp compute one replica, so they need the same rows: the sampler distributes over dp only.
sampler = DistributedSampler(rows, num_replicas=groups.dp.size, rank=groups.dp.rank, seed=0)
batches = DataLoader(rows, batch_size=8 // groups.dp.size, sampler=sampler, drop_last=True)

wrapped = DistributedDataParallel(model.train()) if ranks > 1 else model.train()  # averages gradients over dp
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after the model is split
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 4)
device = next(model.parameters()).device

for step, batch in zip(range(1, STEPS + 1), batches, strict=False):
    total = 0.0
    for number, part in enumerate(batch.to(device).chunk(PARTS)):
        last = number == PARTS - 1
        with nullcontext() if last or ranks == 1 else wrapped.no_sync():
            loss = wrapped(input_ids=part, labels=part).loss / PARTS
            loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the unsplit gradient, the same on every rank
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    if groups.rank == 0 and step in (1, STEPS):
        print(f"step {step}: loss {total:.4f}, gradient norm {norm:.3f}")

pt.save(average.module.eval(), out, tokenizer=tokenizer)  # AutoModelForCausalLM.from_pretrained reads it
if groups.rank == 0:
    print(f"saved to {out}")
