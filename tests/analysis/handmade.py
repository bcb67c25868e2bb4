"""Attention that is known beforehand: matrices put into a layer's place, and a GPT-2 whose heads are set by hand."""

import copy

import torch
from planted import sizes
from torch import nn

from factories import tiny_model
from scionlm.analysis.attention import Attention, attention_seen


def attention_of(matrices, groups=None):
    """An `Attention` with these matrices, `[B, K, T, T]`: each position is its own key, and the query holds logs."""
    batch, heads, length = matrices.shape[:3]
    groups = groups or heads
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch, groups, length, 5, generator=generator)
    keys = torch.eye(length).expand(batch, groups, length, length)
    output = matrices @ values.repeat_interleave(heads // groups, dim=1)
    query = matrices.clamp_min(1e-30).log()
    return Attention(query, keys, values, None, 1.0, None, output.transpose(1, 2))


def causal_softmax(*shape, seed=0, sharpness=4.0):
    """Random causal attention, `[..., T, T]`."""
    logits = sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(logits.masked_fill(~torch.ones(shape[-2:]).tril().bool(), -torch.inf), -1)


def seen(model, ids):
    """The attention of every layer on some tokens, as objects, in order."""
    found = []
    with torch.no_grad(), attention_seen(model, found.append):
        model(input_ids=ids, use_cache=False)
    return found


def all_matrices(attention):
    """`[B, K, T, T]`."""
    rows = range(len(attention.query))
    return torch.stack([attention.matrices(row, slice(0, attention.num_heads)) for row in rows])


def sinks_and_mirrors(layers):
    """A GPT-2 of heads that all look at the first token (`sink`) or each at its own (`mirror`).

    Every token is the same, and no layer adds anything: what attention reads is the position alone, in a channel of
    its own.

    Args:
        layers: For each layer, what each of its four heads is.
    """
    length, width, dim = 12, 32, 8
    model = tiny_model("gpt2", num_hidden_layers=len(layers), attention_bias=True)
    codes = nn.functional.normalize(torch.randn(length, dim, generator=torch.Generator().manual_seed(2)), dim=-1)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:length, :length] = torch.eye(length)
        for layer, heads in zip(model.transformer.h, layers, strict=True):
            layer.ln_1.weight.fill_(1.0)
            layer.ln_1.bias.zero_()
            for parameter in (*layer.attn.c_proj.parameters(), *layer.mlp.c_proj.parameters()):
                parameter.zero_()
            weight, bias = layer.attn.c_attn.weight, layer.attn.c_attn.bias
            weight[:, : 2 * width] = 0.0
            bias[: 2 * width] = 0.0
            for head, kind in enumerate(heads):
                queries = slice(head * dim, (head + 1) * dim)
                keys = slice(width + head * dim, width + (head + 1) * dim)
                if kind == "mirror":
                    weight[:length, queries] = 20.0 * codes
                    weight[:length, keys] = 20.0 * codes
                else:
                    bias[head * dim] = 20.0
                    weight[0, width + head * dim] = 20.0
    return model


def without_layers(model, gone):
    """A copy of a model that never had some of its layers; those that stay are told nothing of it."""
    left = copy.deepcopy(model)
    family = sizes(model)[0]
    parent, _, name = family.layers.rpartition(".")
    layers = left.get_submodule(family.layers)
    keep = [index for index in range(len(layers)) if index not in gone]
    setattr(left.get_submodule(parent), name, nn.ModuleList([layers[index] for index in keep]))
    setattr(left.config, family.key("num_hidden_layers"), len(keep))
    for key in family.per_layer_config:
        setattr(left.config, key, [getattr(left.config, key)[index] for index in keep])
    return left


def hidden_states(model, ids):
    """What goes into each layer, and what comes out of the last; by hooks, as transformers norms the last one."""
    found, handles = [], []
    layers = list(model.get_submodule(sizes(model)[0].layers))

    def before(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def behind(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(layers[-1].register_forward_hook(behind))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def mean_losses(model, ids):
    """Each sequence's mean next-token loss, float64, written out."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    chosen = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return -chosen.mean(1)
