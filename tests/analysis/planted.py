"""Units planted in tiny models, and a Llama written out: what the scores are held against."""

import torch
from torch.nn import functional

from factories import VOCAB_SIZE
from scionlm.families import ModelShape, family_of

TOUCHED = 2  # a layer in the middle, in which units are planted


def tokens(seed=0, sequences=3, length=10):
    return torch.randint(1, VOCAB_SIZE, (sequences, length), generator=torch.Generator().manual_seed(seed))


def sizes(model):
    config = model.config.to_dict()
    return family_of(config), config, ModelShape.of(config)


def layer_of(model, index):
    return model.get_submodule(sizes(model)[0].layers)[index]


def parameters(model, index, *roles):
    """The tensors of a layer that have one of these roles, each with its entry in the family."""
    family, config, _ = sizes(model)
    return [
        (layer_of(model, index).get_parameter(spec.name), spec)
        for spec in family.layer
        if spec.role in roles and family.has(spec, config)
    ]


def labels_of(axis, kind, shape):
    """For each index on an axis: the list of units of a kind that own it, written out by hand."""
    heads, groups, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    everything = {
        ("hidden", "hidden"): [[c] for c in range(shape.hidden_size)],
        ("ffn", "ffn"): [[c] for c in range(shape.intermediate_size)],
        ("heads", "heads"): [[i // dim] for i in range(heads * dim)],
        ("kv_heads", "heads"): [
            [h for h in range(heads) if h * groups // heads == i // dim] for i in range(groups * dim)
        ],
        ("qkv_heads", "heads"): [[i // (3 * dim)] for i in range(3 * heads * dim)],
    }
    length = {
        "hidden": shape.hidden_size,
        "ffn": shape.intermediate_size,
        "heads": heads * dim,
        "kv_heads": groups * dim,
        "qkv_heads": 3 * heads * dim,
    }
    result = []
    for part in axis.split("+"):
        if part in length:
            result += everything.get((part, kind), [[]] * length[part])
    return result


def zero_unit(model, roles, kind, unit, index=TOUCHED):
    """Set every weight to zero that has a unit on an axis."""
    shape = sizes(model)[2]
    with torch.no_grad():
        for parameter, spec in parameters(model, index, *roles):
            for dim, axis in enumerate(spec.axes):
                owners = labels_of(axis, kind, shape)
                where = [i for i, units in enumerate(owners) if unit in units]
                if where:
                    parameter.index_fill_(dim, torch.tensor(where), 0.0)


def zero_values(model, group, index=TOUCHED):
    """Set the values of a key/value head to zero, wherever the family keeps them."""
    _, _, shape = sizes(model)
    dim, heads, groups = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
    starts = {
        "kv_heads": group * dim,
        "heads+kv_heads+kv_heads": (heads + groups + group) * dim,
        "qkv_heads": (3 * group + 2) * dim,
    }
    with torch.no_grad():
        for parameter, spec in parameters(model, index, "value", "qkv"):
            for axis_dim, axis in enumerate(spec.axes):
                if axis in starts:
                    parameter.narrow(axis_dim, starts[axis], dim).zero_()


def llama_gates(model, ids):
    shape = sizes(model)[2]
    counts = {
        "attention_read": shape.hidden_size,
        "mlp_read": shape.hidden_size,
        "heads": shape.num_attention_heads,
        "ffn": shape.intermediate_size,
    }
    return {
        name: torch.ones(shape.num_hidden_layers, len(ids), 1, count, dtype=torch.float64, requires_grad=True)
        for name, count in counts.items()
    }


def plain_llama(model, ids, gates):
    """(mean loss of each sequence, activations by name and layer, layer inputs and outputs)."""
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    shape, eps = sizes(model)[2], model.config.rms_norm_eps
    heads, groups, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    batch, length = ids.shape
    theta = model.config.rope_parameters["rope_theta"]
    angles = torch.outer(torch.arange(length).double(), theta ** (-torch.arange(0, dim, 2).double() / dim))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    def rotate(x):
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    seen = {name: [] for name in gates}
    x = weights["model.embed_tokens.weight"][ids]
    stream = [x]
    for index in range(shape.num_hidden_layers):
        at = f"model.layers.{index}."

        def project(x, name, number, at=at):
            return (x @ weights[f"{at}self_attn.{name}.weight"].T).view(batch, length, number, dim).transpose(1, 2)

        read = norm(x, f"{at}input_layernorm.weight") * gates["attention_read"][index]
        query, key = rotate(project(read, "q_proj", heads)), rotate(project(read, "k_proj", groups))
        value = project(read, "v_proj", groups)
        key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        mixed = torch.softmax(query @ key.transpose(2, 3) / dim**0.5 + causal, -1) @ value
        mixed = mixed.transpose(1, 2) * gates["heads"][index].unsqueeze(-1)
        x = x + mixed.reshape(batch, length, -1) @ weights[f"{at}self_attn.o_proj.weight"].T
        read_2 = norm(x, f"{at}post_attention_layernorm.weight") * gates["mlp_read"][index]
        up, gate = (read_2 @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("up", "gate"))
        inner = functional.silu(gate) * up * gates["ffn"][index]
        x = x + inner @ weights[f"{at}mlp.down_proj.weight"].T
        for name, activation in zip(seen, (read, read_2, mixed, inner), strict=True):
            seen[name].append(activation)
        stream.append(x)
    logits = norm(x, "model.norm.weight") @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    nll = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nll.mean(1), seen, stream


# ---- the loss as a function of one unit's size ----


def slope(model, ids, gate_with, channels, step):
    """|d loss / d factor| at 1, to fourth order in the step; the factor is on channels where `gate_with` puts it."""

    def loss(factor):
        def gate(x):
            factors = torch.ones(x.shape[-1], dtype=x.dtype)
            factors[channels] = factor
            return x * factors

        handles = gate_with(gate)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:]).item()

    near, far = (loss(1 + n * step) - loss(1 - n * step) for n in (1, 2))
    return abs(8 * near - far) / (12 * step)


def gate_input(module, gate):
    return [module.register_forward_pre_hook(lambda m, args: (gate(args[0]), *args[1:]))]


def gate_output(module, gate):
    return [module.register_forward_hook(lambda m, args, out: gate(out))]


def gate_stream(layer, gate):
    """Gate the residual stream, x + norm(attention), between attention and MLP of an OLMo 2 layer."""
    stream = []
    return [
        layer.register_forward_pre_hook(lambda m, args: stream.append(args[0])),
        layer.post_attention_layernorm.register_forward_hook(
            lambda m, args, out: gate(stream[-1] + out) - stream[-1],
        ),
    ]


def source_of(model, ids, reader):
    """The module whose output is what `reader` reads, or None."""
    outputs, read = [], []
    handles = [m.register_forward_hook(lambda m, args, out: outputs.append((m, out))) for m in model.modules()]
    handles.append(reader.register_forward_pre_hook(lambda m, args: read.append(args[0])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return next((module for module, out in outputs if out is read[0]), None)
