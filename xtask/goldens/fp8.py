"""Goldens of fp8, from PyTorch's float8_e4m3fn and float8_e5m2.

    pip install -r xtask/goldens/requirements.txt
    python xtask/goldens/fp8.py

colossal-tensor/tests/goldens/fp8.safetensors: numbers of all sizes with their bytes in both formats, and
linear layers by both recipes: operands scaled by the largest magnitude under a scale, rounded by PyTorch,
multiplied in f64. Of each layer one depth goes over a block of 128: that of y, of dx, of dw.
"""
import os
import torch
from safetensors.torch import save_file

ROOT = os.path.join(os.path.dirname(__file__), "../..")
SEED = 12
META = {"package": "torch", "version": torch.__version__, "seed": str(SEED),
        "tolerance": "bytes equal; products 1e-6 of the largest in f32, 4e-3 in bf16"}
TOP = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
torch.manual_seed(SEED)


def rounded(x, dtype, tile):
    """`x` as PyTorch rounds it, in f64; `tile`: rows and columns that share a scale."""
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=torch.float64)
    top = torch.tensor(TOP[dtype], dtype=torch.float32)
    for r in range(0, rows, tile[0]):
        for c in range(0, cols, tile[1]):
            part = x[r:r + tile[0], c:c + tile[1]]
            scale = part.abs().max() / top
            inverse = 1 / scale if tile == WHOLE else top / part.abs().max()
            q = (part * inverse).clamp(-TOP[dtype], TOP[dtype]).to(dtype)
            out[r:r + tile[0], c:c + tile[1]] = q.double() * scale.double()
    return out


WHOLE = (1 << 30, 1 << 30)
RECIPES = {"tensor": (torch.float8_e5m2, WHOLE, WHOLE), "block": (torch.float8_e4m3fn, (1, 128), (128, 128))}

values = torch.cat([torch.randn(1500) * torch.exp2(torch.empty(1500).uniform_(-20, 17)),
                    torch.tensor([0.0, -0.0, 448.0, -448.0, 57344.0, 2.0**-9, 2.0**-10, 2.0**-16, 2.0**-17])])
out = {"values": values}
for name, dtype in [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]:
    out[name] = values.clamp(-TOP[dtype], TOP[dtype]).to(dtype).view(torch.uint8).int()

for case, (m, n, k) in {"y": (3, 7, 300), "dx": (5, 140, 6), "dw": (150, 5, 4)}.items():
    def wide(*shape):  # As bf16 holds them, so that layers of both types round the same.
        return (torch.randn(shape) * torch.exp2(torch.empty(shape).uniform_(-4, 4))).bfloat16().float()
    x, w, dy, bias = wide(m, k), wide(n, k), wide(m, n), wide(n)
    out |= {f"{case}.x": x, f"{case}.w": w, f"{case}.dy": dy, f"{case}.bias": bias}
    e4m3 = torch.float8_e4m3fn
    for recipe, (grad, rows, blocks) in RECIPES.items():
        y = rounded(x, e4m3, rows) @ rounded(w, e4m3, blocks).T + bias.double()
        dx = rounded(dy, grad, rows) @ rounded(w.T, e4m3, blocks).T
        dw = rounded(dy.T, grad, rows) @ rounded(x.T, e4m3, rows).T
        out |= {f"{case}.{recipe}.{name}": t.float() for name, t in [("y", y), ("dx", dx), ("dw", dw)]}

path = os.path.join(ROOT, "colossal-tensor/tests/goldens/fp8.safetensors")
save_file({k: v.contiguous().clone() for k, v in out.items()}, path, metadata=META)
print("wrote the goldens of fp8")
