"""PyTorch's kernels on a GPU, at a prompt: `gemm bf16 m n k`, `attention_forward bf16 batch seq heads kv_heads d`, …

Answers each line with calls per second: the median of rounds of calls between two events. Attention is
timed by cuDNN and by flash, of which the faster counts; products are what torch.matmul chooses.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def new(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def attention(backward, dtype, b, s, h, kv, d):
    q = new(b, h, s, d, dtype=dtype).requires_grad_(backward)
    k, v = (new(b, kv, s, d, dtype=dtype).requires_grad_(backward) for _ in range(2))
    grad = new(b, h, s, d, dtype=dtype)
    runs = []
    for backend in [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]:
        def call(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != kv)
        try:
            out = call()
        except RuntimeError:
            continue
        runs.append((lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)) if backward else call)
    return runs


def cases(name, dtype, *n):
    dtype = DTYPES[dtype]
    if name == "gemm":
        x, w = new(n[0], n[2], dtype=dtype), new(n[1], n[2], dtype=dtype)
        return [lambda: x @ w.t()]
    if name == "gemm_bias":
        x, w, b = new(n[0], n[2], dtype=dtype), new(n[1], n[2], dtype=dtype), new(n[1], dtype=dtype)
        return [lambda: torch.matmul(x, w.t()) + b]
    if name == "attention_forward":
        with torch.no_grad():
            return attention(False, dtype, *n)
    if name == "attention_backward":
        return attention(True, dtype, *n)
    if name == "rms_norm":
        x, w = new(*n, dtype=dtype), new(n[1], dtype=dtype)
        return [lambda: F.rms_norm(x, (n[1],), w, 1e-5)]
    if name == "layer_norm":
        x, w, b = new(*n, dtype=dtype), new(n[1], dtype=dtype), new(n[1], dtype=dtype)
        return [lambda: F.layer_norm(x, (n[1],), w, b, 1e-5)]
    if name == "swiglu":
        a, b = new(*n, dtype=dtype), new(*n, dtype=dtype)
        return [torch.compile(lambda a=a, b=b: F.silu(a) * b)]
    if name == "cross_entropy":
        logits, targets = new(*n, dtype=dtype), torch.randint(0, n[1], (n[0],), device="cuda")
        return [lambda: F.cross_entropy(logits.float(), targets)]
    # In 8 bits: the product of the same sizes in bf16, for what PyTorch has no kernel of.
    if name in ("gemm_int8", "gemm_fp8_blocks"):
        x, w = new(n[0], n[2], dtype=dtype), new(n[1], n[2], dtype=dtype)
        return [lambda: x @ w.t()]
    if name == "gemm_fp8":
        x, w = (new(r, n[2], dtype=dtype).to(torch.float8_e4m3fn) for r in n[:2])
        one = torch.ones((), device="cuda")
        return [lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=dtype)]
    if name == "paged_attention":
        batch, length, heads, kv_heads, d = n
        q, (k, v) = new(batch, heads, 1, d, dtype=dtype), (new(batch, kv_heads, length, d, dtype=dtype) for _ in range(2))
        return [lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)]
    if name == "conv2d":
        batch, channels, out, side, kernel = n
        x, w = new(batch, channels, side, side, dtype=dtype), new(out, channels, kernel, kernel, dtype=dtype)
        return [lambda: F.conv2d(x, w, padding=kernel // 2)]
    if name == "embedding_backward":
        ids, dy = torch.randint(0, n[1], (n[0],), device="cuda"), new(n[0], n[2], dtype=dtype)
        return [lambda: torch.ops.aten.embedding_dense_backward(dy, ids, n[1], -1, False)]
    if name == "adamw":
        p = torch.nn.Parameter(new(*n, dtype=torch.float32))
        p.grad = new(*n, dtype=torch.float32)
        return [torch.optim.AdamW([p], lr=1e-3, fused=True).step]
    return []


def time(run):
    for _ in range(3):
        run()
    rounds = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 5)
    return statistics.median(rounds) / 1e3


print(json.dumps({"name": f"PyTorch {torch.__version__.split('+')[0]}"}), flush=True)
for line in sys.stdin:
    name, dtype, *sizes = line.split()
    torch.manual_seed(0)
    runs = cases(name, dtype, *map(int, sizes))
    if not runs:
        print(json.dumps({"error": f"no such case: {line.strip()}"}), flush=True)
        continue
    best = min(time(run) for run in runs)
    print(json.dumps({"speed": 1 / best}), flush=True)
    del runs
    torch.cuda.empty_cache()
