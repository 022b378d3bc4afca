"""A PyTorch training step of the reference models, at a prompt: fused AdamW, random tokens.

Says who it is, then answers each line with the median speed of 3 steps. `--mode compile` is
torch.compile of forward and loss; bf16 is autocast. gpt and llama are small (4 x 256 tokens, for CPUs);
gpt2-124m (16 x 1024) and llama-1b (2 x 4096) are for GPUs.
"""
import argparse
import contextlib
import json
import os
import statistics
import sys
import time

ap = argparse.ArgumentParser()
SIZES = {  # vocabulary, width, layers, heads, key heads, feed-forward, tokens, sequences
    "gpt": (8192, 512, 8, 8, 8, 2048, 256, 4),
    "llama": (8192, 512, 8, 8, 4, 1376, 256, 4),
    "gpt2-124m": (50304, 768, 12, 12, 12, 3072, 1024, 16),
    "llama-1b": (32000, 2048, 16, 32, 8, 8192, 4096, 2),
}
ap.add_argument("--model", choices=SIZES, default="llama")
ap.add_argument("--device", default="cpu")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
ap.add_argument("--mode", choices=["eager", "compile"], default="eager")
args = ap.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
import torch.nn as nn
import torch.nn.functional as F

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, FFN, SEQ, BATCH = SIZES[args.model]
SIZE = WIDTH // HEADS
torch.set_float32_matmul_precision("high" if args.device != "cpu" else "highest")
torch.set_num_threads(args.threads)
torch.manual_seed(0)


def linear(inputs, outputs, bias=False):
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def heads(x):
    return x.view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)


class GptBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH, True), linear(WIDTH, WIDTH, True)
        self.up, self.down = linear(WIDTH, 4 * WIDTH, True), linear(4 * WIDTH, WIDTH, True)

    def forward(self, x):
        q, k, v = (heads(y) for y in self.qkv(self.norm1(x)).split(WIDTH, -1))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-5), nn.RMSNorm(WIDTH, 1e-5)
        self.q, self.out = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.k, self.v = linear(WIDTH, KV_HEADS * SIZE), linear(WIDTH, KV_HEADS * SIZE)
        self.gate, self.up, self.down = linear(WIDTH, FFN), linear(WIDTH, FFN), linear(FFN, WIDTH)
        angle = torch.outer(torch.arange(SEQ).float(), 10000.0 ** (-torch.arange(0, SIZE, 2).float() / SIZE))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin(), persistent=False)

    def rope(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-b, a], -1) * self.sin.to(x.dtype)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = self.rope(heads(self.q(h))), self.rope(heads(self.k(h))), heads(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(h.transpose(1, 2).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, gpt):
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(SEQ, WIDTH) if gpt else None
        self.blocks = nn.ModuleList([GptBlock() if gpt else LlamaBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH) if gpt else nn.RMSNorm(WIDTH, 1e-5)
        self.head = linear(WIDTH, VOCAB)
        nn.init.normal_(self.words.weight, std=0.02)
        if gpt:
            self.head.weight = self.words.weight

    def forward(self, ids, targets):
        x = self.words(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(SEQ, device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


model = Decoder(args.model.startswith("gpt")).to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
forward = torch.compile(model) if args.mode == "compile" else model
ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), device=args.device)


def step():
    start = time.perf_counter()
    with torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext():
        loss = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


for _ in range(2):
    step()
print(json.dumps({"name": f"PyTorch {torch.__version__.split('+')[0]}"}), flush=True)
for _ in sys.stdin:
    seconds = statistics.median(step() for _ in range(3))
    print(json.dumps({"speed": BATCH * SEQ / seconds}), flush=True)
