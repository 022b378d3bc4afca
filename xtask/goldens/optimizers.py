"""Goldens of the optimizers with factored second moments: Adafactor and CAME.

    pip install -r xtask/goldens/requirements.txt
    python xtask/goldens/optimizers.py

Steps of a matrix, a vector and a stack of matrices by `transformers.optimization.Adafactor` and
`came_pytorch.CAME`: CASE.START.SHAPE the parameter before, CASE.grad.N.SHAPE its gradients,
CASE.SHAPE the parameter after. Written to colossal-kernels/tests/goldens/optimizers.safetensors.
"""
import os
import came_pytorch
import importlib.metadata
import torch
import transformers
from safetensors.torch import save_file
from transformers.optimization import Adafactor

OUT = os.path.join(os.path.dirname(__file__), "../../colossal-kernels/tests/goldens")
SHAPES = {"matrix": (7, 21), "vector": (9,), "stack": (3, 4, 5)}
STEPS = 4
FIXED = dict(relative_step=False, warmup_init=False)
CASES = {
    "adafactor": lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, weight_decay=0.1, **FIXED),
    "adafactor_scaled": lambda p: Adafactor(p, lr=1e-1, scale_parameter=True, **FIXED),
    "came": lambda p: came_pytorch.CAME(p, lr=1e-2, weight_decay=0.1),
}

torch.manual_seed(7)
golden = {}
for case, new in CASES.items():
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = new(list(params.values()))
    for name, p in params.items():
        golden[f"{case}.start.{name}"] = p.detach().clone()
    for step in range(STEPS):
        for name, p in params.items():
            # Rows of unlike size: factors that differ.
            p.grad = torch.randn_like(p) * (1 + torch.arange(p.shape[-1])) * 10.0 ** (step - 2)
            golden[f"{case}.grad.{step}.{name}"] = p.grad.clone()
        optimizer.step()
    for name, p in params.items():
        golden[f"{case}.{name}"] = p.detach().clone()
meta = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": "7",
        "came-pytorch": importlib.metadata.version("came-pytorch"), "tolerance": "f32 2e-5"}
os.makedirs(OUT, exist_ok=True)
save_file({k: v.contiguous() for k, v in golden.items()}, os.path.join(OUT, "optimizers.safetensors"),
          metadata=meta)
