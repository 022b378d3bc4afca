"""PyTorch's kernels, at a prompt: `gemm f32 m n k`, `attention bf16 batch seq heads head_dim`, …

Answers each line with calls per second, the median of calls over about 0.3 s.
"""
import argparse
import itertools
import json
import os
import statistics
import sys
import time
import warnings

ap = argparse.ArgumentParser()
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--deepspeed", action="store_true", help="AdamW is DeepSpeed's, whose op g++ builds on first use: minutes")
args = ap.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
import torch.nn.functional as F

torch.set_num_threads(args.threads)
name = f"PyTorch {torch.__version__.split('+')[0]}"
if args.deepspeed:
    # ninja lies beside Python.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    name = f"DeepSpeed {deepspeed.__version__}"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def case(name, dtype, *sizes):
    if dtype == "int8":
        # A linear layer that rounds its input as it comes, with a scale of each output channel.
        m, n, k = sizes
        from torch.ao import quantization

        warnings.simplefilter("ignore")  # it is about to move to another package
        recipe = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
        layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
        layer, x = quantization.quantize_dynamic(layer, recipe), torch.randn(m, k)

        def rounded():
            with torch.no_grad():
                layer(x)

        return rounded
    dtype = DTYPES[dtype]
    if name in ("gemm", "gemm_nn", "gemm_tn"):
        # A linear layer, one whose weights lie by input as in GPT-2, and the gradient of weights.
        m, n, k = sizes
        x = torch.randn((k, m) if name == "gemm_tn" else (m, k)).to(dtype)
        w = torch.randn((n, k) if name == "gemm" else (k, n)).to(dtype)
        # Few rows are about reading weights: 256 MiB of them take turns, so that no cache holds them.
        copies = max(2, (256 << 20) // (n * k * dtype.itemsize)) if m <= 16 and name != "gemm_tn" else 1
        weights = itertools.cycle([w.clone() for _ in range(copies)])

        def product():
            with torch.no_grad():
                w = next(weights)
                if name == "gemm":
                    F.linear(x, w)
                else:
                    torch.matmul(x.T if name == "gemm_tn" else x, w)

        return product
    if name == "attention":
        b, s, h, d = sizes
        q, k, v = (torch.randn(b, s, h, d).to(dtype).requires_grad_() for _ in range(3))
        grad = torch.randn(b, h, s, d).to(dtype)

        def both():
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
            torch.autograd.grad(out, (q, k, v), grad)

        return both
    if name == "cross_entropy":
        rows, vocab = sizes
        logits, targets = torch.randn(rows, vocab).to(dtype).requires_grad_(), torch.randint(0, vocab, (rows,))

        def loss():
            torch.autograd.grad(F.cross_entropy(logits, targets), logits)

        return loss
    if name == "adamw":
        p = torch.nn.Parameter(torch.randn(*sizes))
        p.grad = torch.randn(*sizes)
        if args.deepspeed:
            return DeepSpeedCPUAdam([p], lr=1e-3, weight_decay=0.01).step
        return torch.optim.AdamW([p], lr=1e-3, fused=True).step
    return None


print(json.dumps({"name": name}), flush=True)
for line in sys.stdin:
    kernel, dtype, *sizes = line.split()
    torch.manual_seed(0)
    run = case(kernel, dtype, *map(int, sizes))
    if run is None:
        print(json.dumps({"error": "no such case"}), flush=True)
        continue
    run()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < 0.3 or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(json.dumps({"speed": 1 / statistics.median(times)}), flush=True)
