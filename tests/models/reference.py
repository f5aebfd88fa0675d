"""A second implementation, as a judge: forward passes in NumPy float64 that share no code with the package.

`matmul_free` follows the released code of Zhu et al. 2024 (arXiv 2406.02528) and takes tensors under its names and in
its [out, in] layout; `transformer` follows Llama likewise. `state_dict` reads our parameters out under those names.
"""

import numpy as np


def rms(x, gain, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def act_quant(x):
    s = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.clip(np.round(x * s), -128, 127) / s


def weight_quant(w):
    s = 1 / max(np.abs(w).mean(), 1e-5)
    return np.clip(np.round(w * s), -1, 1) / s


def bit(p, name, x):
    return act_quant(rms(x, p[name + ".norm.weight"])) @ weight_quant(p[name + ".weight"]).T


def matmul_free(p, ids, layers):
    h = p["model.embeddings.weight"][ids]
    e = np.exp(p["model.lower_bounds"])
    floor = np.cumsum(e / e.sum(0), 0)
    floor -= floor[0]
    for layer in range(layers):
        n = f"model.layers.{layer}."
        u = rms(h, p[n + "attn_norm.weight"])
        i = bit(p, n + "attn.i_proj", u)
        f = floor[layer] + (1 - floor[layer]) * sigmoid(bit(p, n + "attn.f_proj", u))
        i = i * sigmoid(i) * (1 - f)
        s, state = np.zeros_like(i), np.zeros_like(i[:, 0])
        for t in range(ids.shape[1]):
            state = f[:, t] * state + i[:, t]
            s[:, t] = state
        y = rms(bit(p, n + "attn.g_proj", u), p[n + "attn.g_norm.weight"]) * s * sigmoid(s)
        h = h + bit(p, n + "attn.o_proj", y)
        gate, up = np.split(bit(p, n + "mlp.gate_proj", rms(h, p[n + "mlp_norm.weight"])), 2, -1)
        h = h + bit(p, n + "mlp.down_proj", gate * sigmoid(gate) * up)
    return bit(p, "lm_head", rms(h, p["model.norm.weight"]))


def rope(x, theta):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def transformer(p, ids, layers, heads, theta=1e4):
    h = p["model.embed_tokens.weight"][ids]
    batch, time, width = h.shape
    for layer in range(layers):
        n = f"model.layers.{layer}."
        u = rms(h, p[n + "input_layernorm.weight"])
        q, k, v = ((u @ p[f"{n}self_attn.{x}_proj.weight"].T).reshape(batch, time, heads, -1) for x in "qkv")
        score = np.einsum("bthk,bshk->bhts", rope(q, theta), rope(k, theta)) / np.sqrt(width // heads)
        score = np.where(np.tri(time, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        y = np.einsum("bhts,bshk->bthk", weight / weight.sum(-1, keepdims=True), v).reshape(batch, time, width)
        h = h + y @ p[n + "self_attn.o_proj.weight"].T
        u = rms(h, p[n + "post_attention_layernorm.weight"])
        gate = u @ p[n + "mlp.gate_proj.weight"].T
        h = h + (gate * sigmoid(gate) * (u @ p[n + "mlp.up_proj.weight"].T)) @ p[n + "mlp.down_proj.weight"].T
    return rms(h, p["model.norm.weight"]) @ p["lm_head.weight"].T


def numbers(param):
    return np.asarray(param[...], np.float64)


def state_dict(model):
    """Our parameters under the names and in the layout of the official code, float64."""
    blocks, out = (
        model.blocks,
        {"lm_head.weight": numbers(model.head.kernel).T, "model.norm.weight": numbers(model.norm.gain)},
    )
    recurrent = model.config.mixer == "mlgru"
    out["model.embeddings.weight" if recurrent else "model.embed_tokens.weight"] = numbers(model.embedding)
    if recurrent:
        out |= {"model.lower_bounds": numbers(model.lower_bounds), "lm_head.norm.weight": numbers(model.head.gain)}
    for layer in range(model.config.depth):
        read = _official_layer if recurrent else _llama_layer
        for name, array in read(blocks):
            matrix = name.endswith("proj.weight")
            out[f"model.layers.{layer}.{name}"] = array[layer].T if matrix else array[layer]
    return out


def _official_layer(b):
    gates, gains = numbers(b.mixer.gates.kernel), numbers(b.mixer.gates.gain)
    for g, name in enumerate("ifg"):
        yield f"attn.{name}_proj.weight", gates[:, g]
        yield f"attn.{name}_proj.norm.weight", gains[:, g]
    packed = numbers(b.glu.gate_up.kernel)
    yield "mlp.gate_proj.weight", np.concatenate([packed[:, 0], packed[:, 1]], -1)
    yield "mlp.gate_proj.norm.weight", numbers(b.glu.gate_up.gain)
    for name, layer in (("attn.o_proj", b.mixer.out), ("mlp.down_proj", b.glu.down)):
        yield f"{name}.weight", numbers(layer.kernel)
        yield f"{name}.norm.weight", numbers(layer.gain)
    yield "attn.g_norm.weight", numbers(b.mixer.gate_norm.gain)
    yield "attn_norm.weight", numbers(b.mixer_norm.gain)
    yield "mlp_norm.weight", numbers(b.glu_norm.gain)


def _llama_layer(b):
    pair, packed = numbers(b.mixer.key_value.kernel), numbers(b.glu.gate_up.kernel)
    yield "self_attn.q_proj.weight", numbers(b.mixer.query.kernel)
    yield "self_attn.k_proj.weight", pair[:, 0]
    yield "self_attn.v_proj.weight", pair[:, 1]
    yield "self_attn.o_proj.weight", numbers(b.mixer.out.kernel)
    yield "mlp.gate_proj.weight", packed[:, 0]
    yield "mlp.up_proj.weight", packed[:, 1]
    yield "mlp.down_proj.weight", numbers(b.glu.down.kernel)
    yield "input_layernorm.weight", numbers(b.mixer_norm.gain)
    yield "post_attention_layernorm.weight", numbers(b.glu_norm.gain)
