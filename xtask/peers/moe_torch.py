"""A training step of transformers' Mixtral, at a prompt: fused AdamW, 4 x 256 tokens, f32, two threads.

Says who it is, then answers each line with the median speed of 3 steps. `--experts eager` is the
loop over experts of the published model; `grouped_mm` and `batched_mm` are its faster forms.
"""
import argparse
import json
import statistics
import sys
import time

ap = argparse.ArgumentParser()
ap.add_argument("--experts", default="eager")
args = ap.parse_args()

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

torch.set_num_threads(2)
torch.manual_seed(0)
config = MixtralConfig(vocab_size=8192, hidden_size=512, intermediate_size=688, num_hidden_layers=4,
                       num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
                       max_position_embeddings=256, attn_implementation="sdpa",
                       experts_implementation=args.experts, use_cache=False, output_router_logits=True)
model = MixtralForCausalLM(config).float()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
ids = torch.randint(0, 8192, (4, 256))


def step():
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


step()
print(json.dumps({"name": f"transformers {transformers.__version__} {args.experts}"}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"speed": 4 * 256 / statistics.median(step() for _ in range(3))}), flush=True)
