"""Goldens of PPO's arithmetic, computed by TRL's own functions, and of the reward model's loss.

    pip install --no-deps --target trl trl==0.11.4     # the last line with PPOTrainer.loss
    pip install torch==2.15.0 safetensors==0.8.0
    python xtask/goldens/ppo.py trl

The functions are taken out of the installed package's source by name and run on random tensors: five answers of
unequal length (one token the shortest), some ratios and values beyond their clips, an exact tie at ratio 1.
colossal-apps/tests/goldens/ppo.safetensors holds inputs and results; gradients are torch's.
"""
import ast
import os
import sys
import types
import warnings

import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.join(sys.argv[1], "trl")
SEED = 5
CONFIG = types.SimpleNamespace(gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.3, vf_coef=0.1,
                               whiten_rewards=False, kl_penalty="kl", ratio_threshold=100.0)


def take(path, names):
    """The functions (or methods) of these names, compiled from a file without importing its package."""
    tree = ast.parse(open(os.path.join(PACKAGE, path)).read())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list = []
    module = ast.Module(body=found, type_ignores=[])
    ast.fix_missing_locations(module)
    exec(compile(module, path, "exec"), globals())


from collections.abc import Mapping, MutableMapping  # noqa: E402
from typing import Dict, List, Optional, Tuple, Union  # noqa: E402  (names that the sources use)
import torch.nn.functional as F  # noqa: E402

take("core.py", {"masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits",
                 "flatten_dict"})
take("trainer/ppo_trainer.py", {"compute_advantages", "compute_rewards", "_kl_penalty", "loss"})

torch.manual_seed(SEED)
lengths = [7, 1, 4, 6, 3]
B, T = len(lengths), max(lengths)
mask = torch.tensor([[1.0 if t < n else 0.0 for t in range(T)] for n in lengths])
old = -torch.rand(B, T) * 3
ref = old + 0.3 * torch.randn(B, T)
now = old + 0.25 * torch.randn(B, T)
now[0, 0] = old[0, 0]
values, new_values = torch.randn(B, T), torch.randn(B, T)
scores = torch.randn(B)
trainer = types.SimpleNamespace(config=CONFIG, kl_ctl=types.SimpleNamespace(value=0.05))
trainer._kl_penalty = lambda a, b: _kl_penalty(trainer, a, b)

rewards, _, _ = compute_rewards(trainer, scores, old, ref, mask)
_, advantages, returns = compute_advantages(trainer, values, rewards, mask)
logprobs = now.clone().requires_grad_(True)
vpreds = new_values.clone().requires_grad_(True)
pg, vf, stats = loss(trainer, old, values, torch.zeros(B, T, 2), vpreds, logprobs, mask, advantages, returns)
pg.backward()
vf.backward()

chosen = torch.randn(6, requires_grad=True)
rejected = torch.randn(6, requires_grad=True)
# The formula of reward models (TRL's reward_trainer has it inside a method), with margin and centring.
pair = -F.logsigmoid(chosen - rejected - 0.2).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
pair.backward()

golden = {"lengths": torch.tensor(lengths, dtype=torch.int32), "old": old, "ref": ref, "now": now, "values": values,
          "new_values": new_values, "scores": scores, "rewards": rewards, "advantages": advantages * mask,
          "returns": returns, "policy_loss": pg, "value_loss": vf / CONFIG.vf_coef, "dnow": logprobs.grad,
          "dvalues": vpreds.grad / CONFIG.vf_coef, "clipfrac": stats["policy/clipfrac"].reshape(1)
          if "policy/clipfrac" in stats else stats["policy"]["clipfrac"].reshape(1),
          "chosen": chosen, "rejected": rejected, "pair_loss": pair, "dchosen": chosen.grad,
          "drejected": rejected.grad}
golden = {k: v.detach().reshape(v.shape or (1,)).contiguous() for k, v in golden.items()}
out = os.path.join(HERE, "../../colossal-apps/tests/goldens")
os.makedirs(out, exist_ok=True)
meta = {"package": "trl, torch", "version": "0.11.4, " + torch.__version__, "seed": str(SEED),
        "tolerance": "f32: 1e-5 relative to the largest"}
save_file(golden, os.path.join(out, "ppo.safetensors"), metadata=meta)
print({k: tuple(v.shape) for k, v in golden.items()}, float(pg), float(vf), float(golden["clipfrac"]))
