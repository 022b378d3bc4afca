"""PyTorch's own parallelisms on the reference LLaMA, for `plan_bench`: two ranks of one thread (gloo).

    python xtask/peers/tensor_parallel_torch.py          # one rank of two threads, DTensor tp 2, in turns

Prints the median tokens/s of 3 steps of 4 x 256 tokens (f32, fused AdamW), and the ratio to one rank.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ap = argparse.ArgumentParser()
ap.add_argument("--worker", choices=["one", "tp"])
ap.add_argument("--rounds", type=int, default=3)
args = ap.parse_args()

if not args.worker:
    found = {"one": [], "tp": []}
    for _ in range(args.rounds):
        for kind in found:
            world = 2 if kind == "tp" else 1
            env = dict(os.environ, OMP_NUM_THREADS=str(2 // world), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT="29561")
            ranks = [subprocess.Popen([sys.executable, __file__, "--worker", kind], stdout=subprocess.PIPE,
                                      env=dict(env, RANK=str(r))) for r in range(world)]
            outs = [r.communicate()[0] for r in ranks]
            found[kind].append(json.loads(outs[0].splitlines()[-1])["speed"])
    for kind, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, found["one"]))
        print(f"{kind:4}{statistics.median(speeds):8.0f} tokens/s  {ratio:.2f}")
    sys.exit()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
                     attn_implementation="sdpa", use_cache=False)
model = LlamaForCausalLM(config).float()
rank = int(os.environ["RANK"])
if args.worker == "tp":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {
            "self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()})
    parallelize_module(model, mesh, {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate())})
opt = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, foreach=False if args.worker == "tp" else None)
ids = torch.randint(0, 8192, (4, 257), generator=torch.Generator().manual_seed(0))
speeds = []
for step in range(4):
    if args.worker == "tp":
        dist.barrier()
    start = time.perf_counter()
    logits = model(input_ids=ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    opt.step()
    opt.zero_grad()
    speeds.append(4 * 256 / (time.perf_counter() - start))
if rank == 0:
    print(json.dumps({"speed": statistics.median(speeds[1:]), "loss": loss.item()}))
