"""PyTorch's tensor parallelism (DTensor, gloo) on the reference LLaMA, at a prompt: two ranks of one thread.

Says who it is, then answers each line with the median speed of 3 steps of 4 x 256 tokens (f32, AdamW).
The second rank is a child of the first.
"""
import json
import os
import socket
import statistics
import subprocess
import sys
import time

if "RANK" not in os.environ:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0")
    subprocess.Popen([sys.executable, __file__], env=dict(os.environ, RANK="1"), stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
                     attn_implementation="sdpa", use_cache=False)
model = LlamaForCausalLM(config).float()
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
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, foreach=False)
ids = torch.randint(0, 8192, (4, 257), generator=torch.Generator().manual_seed(0))


def step():
    dist.barrier()
    start = time.perf_counter()
    logits = model(input_ids=ids[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def turn():
    return 4 * 256 / statistics.median(step() for _ in range(3))


step()
go = torch.ones(1)
if dist.get_rank() == 0:
    print(json.dumps({"name": f"PyTorch {torch.__version__.split('+')[0]} DTensor tp 2"}), flush=True)
    for _ in sys.stdin:
        dist.broadcast(go, 0)
        print(json.dumps({"speed": turn()}), flush=True)
else:
    # Ends with an error of gloo when the first rank is gone.
    while True:
        dist.broadcast(go, 0)
        turn()
