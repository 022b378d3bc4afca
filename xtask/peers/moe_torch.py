"""A training step of transformers' Mixtral with its loop over experts, for `plan_bench moe`.

Prints the median tokens/s of 3 steps of 4 x 256 tokens (f32, AdamW, two threads).
"""
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.set_num_threads(2)
torch.manual_seed(0)
for kind in ["eager", "batched_mm", "grouped_mm"]:
    try:
        config = MixtralConfig(vocab_size=8192, hidden_size=512, intermediate_size=688, num_hidden_layers=4,
                               num_attention_heads=8, num_key_value_heads=4, num_local_experts=8,
                               num_experts_per_tok=2, max_position_embeddings=256, attn_implementation="sdpa",
                               experts_implementation=kind, use_cache=False, output_router_logits=True)
        model = MixtralForCausalLM(config).float()
        opt = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
        ids = torch.randint(0, 8192, (4, 256))
        speeds = []
        for step in range(4):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            opt.step()
            opt.zero_grad()
            speeds.append(4 * 256 / (time.perf_counter() - start))
        print(f"{kind:12}{statistics.median(speeds[1:]):8.0f} tokens/s")
    except Exception as error:
        print(f"{kind:12} {type(error).__name__}: {error}")
