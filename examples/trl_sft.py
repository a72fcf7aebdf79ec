"""Fine-tune a split model on prompts and completions with TRL's SFTTrainer. Needs `pip install trl`.

torchrun --nproc-per-node 2 examples/trl_sft.py runs/sft                  # a tiny new model
torchrun --nproc-per-node 2 examples/trl_sft.py runs/sft ./model
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import partita.torch as pt

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32", "eos_token_id": 256, "pad_token_id": 256,
}  # fmt: skip

ranks = pt.join()  # the ranks of the launcher, or this process alone

out = sys.argv[1]
if len(sys.argv) > 2:
    model, tokenizer = pt.load(sys.argv[2], tp=ranks), pt.load_tokenizer(sys.argv[2])
else:
    model, tokenizer = pt.fresh(TINY, tp=ranks, seed=0), pt.byte_tokenizer()

sums = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
trainer = pt.split_trainer(SFTTrainer)(
    model,
    args=SFTConfig(out, per_device_train_batch_size=8, max_steps=20, learning_rate=3e-3, report_to=[], bf16=False),
    train_dataset=Dataset.from_list(sums),
    processing_class=tokenizer.inner,
)
trainer.train()
trainer.save_model()  # AutoModelForCausalLM.from_pretrained reads it
if trainer.is_world_process_zero():
    first, last = trainer.state.log_history[0]["loss"], trainer.state.log_history[-2]["loss"]
    print(f"loss {first:.3f} -> {last:.3f}")
