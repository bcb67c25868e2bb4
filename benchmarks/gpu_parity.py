"""Loss and gradients of a small Llama in bf16, on GPU and CPU, beside float32: a part of `gpu.py`."""

import math

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from scionlm.train.objective import Objective


def parity_of(shape, cuda, report):
    """Compare loss and gradients in bf16, here and on a CPU, with float32 on a CPU."""
    torch.manual_seed(0)
    shape |= {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 704}
    shape["vocab_size"] = 2048
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32)
    tokens = torch.randint(0, 2048, (4, 129))

    def graded(device, dtype, compiled=False):
        objective = Objective(model.to(device), dtype)
        if compiled:
            objective.compile()
        loss, count, _ = objective(tokens[:, :-1], tokens[:, 1:])
        (loss / count).backward()
        gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
        model.zero_grad()
        return float(loss.detach() / count), gradients

    exact_loss, exact = graded("cpu", torch.float32)
    size = math.sqrt(sum(float(g.square().sum()) for g in exact.values()))

    def distance(found):
        loss, gradients = found
        off = {name: float((gradients[name] - g).norm()) for name, g in exact.items()}
        worst = max(off, key=lambda name: off[name] / float(exact[name].norm()))
        return {
            "loss": abs(loss / exact_loss - 1),
            "gradient": math.sqrt(sum(o * o for o in off.values())) / size,
            "worst_tensor": off[worst] / float(exact[worst].norm()),
            "worst": worst,
        }

    mine = {"cpu_bf16": distance(graded("cpu", torch.bfloat16))}
    report(loss_float32=exact_loss, distances=mine)
    if not cuda:
        return
    mine["cuda_float32"] = distance(graded("cuda", torch.float32))
    mine["cuda_bf16"] = distance(graded("cuda", torch.bfloat16))
    report(distances=mine)
    mine["cuda_bf16_compiled"] = distance(graded("cuda", torch.bfloat16, compiled=True))
    ratios = {
        name: mine[name]["gradient"] / mine["cpu_bf16"]["gradient"] for name in mine if name.startswith("cuda_bf16")
    }
    report(distances=mine, gradient_over_cpu_bf16=ratios, holds=max(ratios.values()) <= 2)
