"""Goldens of routers and their losses, from transformers.

    pip install -r xtask/goldens/requirements.txt
    python xtask/goldens/routing.py

colossal-tensor/tests/goldens/routing.safetensors: Mixtral's load-balancing loss and Switch's z-loss
over two layers with padding, with their gradients; the router of DeepSeek-V3 with groups and a bias.
colossal-models/tests/goldens/mixtral/auxiliary.safetensors: the losses and the routers' gradients of
the golden Mixtral on a padded batch. Run it after decoders.py.
"""
import os
import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV3Config, MixtralForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

ROOT = os.path.join(os.path.dirname(__file__), "../..")
SEED = 11
META = {"package": "transformers", "version": transformers.__version__, "torch": torch.__version__,
        "seed": str(SEED), "tolerance": "f32: 1e-5 relative to the largest"}
torch.manual_seed(SEED)


def save(path, tensors):
    path = os.path.join(ROOT, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path, metadata=META)


# Two layers, two sequences of five tokens (the second has two of padding), six experts, two a token.
logits = [(2 * torch.randn(10, 6)).requires_grad_() for _ in range(2)]
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
out = {"real": mask.int()}
even = load_balancing_loss_func(tuple(logits), 6, 2, mask)
real = mask.flatten().bool()
z = router_z_loss_func(torch.cat([x[real] for x in logits])[None])
out |= {"even": even.reshape(1), "z": z.reshape(1)}
for name, loss in [("even", even), ("z", z)]:
    grads = torch.autograd.grad(loss, logits)
    out |= {f"{name}.{i}": g for i, g in enumerate(grads)}
out |= {f"logits.{i}": x for i, x in enumerate(logits)}

for norm in [True, False]:
    config = DeepseekV3Config(hidden_size=8, num_local_experts=12, n_routed_experts=12, num_experts_per_tok=3,
                              n_group=4, topk_group=2, norm_topk_prob=norm, routed_scaling_factor=2.5)
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.uniform_(0.0, 0.3)
    x = torch.randn(9, 8)
    found = router(x)
    scores, weights, choice = found
    kind = "normalized" if norm else "plain"
    order = weights.argsort(-1, descending=True)
    out |= {f"{kind}.logits": x @ router.weight.T, f"{kind}.bias": router.e_score_correction_bias,
            f"{kind}.choice": choice.gather(1, order).int(), f"{kind}.weights": weights.gather(1, order)}
save("colossal-tensor/tests/goldens/routing.safetensors", out)

model = MixtralForCausalLM.from_pretrained(
    os.path.join(ROOT, "colossal-models/tests/goldens/mixtral"), attn_implementation="eager",
    experts_implementation="eager").float().eval()
model.router_aux_loss_coef = 0.5
ids = torch.randint(0, model.config.vocab_size, (2, 7))
mask = torch.ones_like(ids)
mask[1, 4:] = 0
labels = ids.masked_fill(mask == 0, -100)
y = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
y.loss.backward()
out = {"ids": ids.int(), "lengths": mask.sum(1).int(), "auxiliary": (0.5 * y.aux_loss).reshape(1),
       "loss": y.loss.reshape(1)}
for key, p in model.named_parameters():
    if key.endswith("gate.weight"):
        out["grad." + key.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = p.grad
save("colossal-models/tests/goldens/mixtral/auxiliary.safetensors", out)
print("wrote the goldens of routing")
