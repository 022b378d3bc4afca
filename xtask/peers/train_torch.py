"""A PyTorch training step of the two reference models: eager, stock, f32, fused AdamW.

Prints the version and, on the last line, tokens per second (median of 3 steps after 1).
"""
import argparse
import statistics
import time

ap = argparse.ArgumentParser()
ap.add_argument("--model", choices=["gpt", "llama"], default="llama")
ap.add_argument("--threads", type=int, default=2)
args = ap.parse_args()

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(args.threads)
torch.manual_seed(0)
if args.model == "gpt":
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=256, n_embd=512, n_layer=8, n_head=8,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1376,
                                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                                         max_position_embeddings=256, use_cache=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
ids = torch.randint(0, 8192, (4, 256))
times = []
for _ in range(4):
    start = time.perf_counter()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter() - start)
print("torch", torch.__version__)
print(f"{4 * 256 / statistics.median(times[1:]):.1f} tokens/s")
