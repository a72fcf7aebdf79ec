"""Train a split model with Hugging Face's Trainer: saves, resumes and evaluates as on one device.

torchrun --nproc-per-node 2 examples/trainer.py runs/trainer                  # a tiny new model
torchrun --nproc-per-node 2 examples/trainer.py runs/trainer ./model
"""

import sys

from transformers import Trainer, TrainingArguments, default_data_collator

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
LENGTH = 32

ranks = pt.join()  # the ranks of the launcher, or this process alone

out = sys.argv[1]
if len(sys.argv) > 2:
    model, tokenizer = pt.load(sys.argv[2], tp=ranks), pt.load_tokenizer(sys.argv[2])
else:
    model, tokenizer = pt.fresh(TINY, tp=ranks, seed=0), pt.byte_tokenizer()

tokens = pt.load_tokens("stdlib", tokenizer, limit_bytes=20_000)
rows = [{"input_ids": row, "labels": row} for row in tokens.split(LENGTH) if len(row) == LENGTH]
arguments = TrainingArguments(
    out, per_device_train_batch_size=8, max_steps=20, learning_rate=3e-3, save_steps=10, logging_steps=10, report_to=[],
    disable_tqdm=True,
)  # fmt: skip
trainer = pt.split_trainer(Trainer)(
    model=model, args=arguments, train_dataset=rows[20:], eval_dataset=rows[:20], data_collator=default_data_collator
)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    print(f"evaluation loss {loss:.4f}")
trainer.save_model()  # AutoModelForCausalLM.from_pretrained reads it
