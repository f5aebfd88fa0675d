"""Makes the folders beside this file: small BitNet models with random weights, and the logits that transformers' own
class computes of them in float32.

    pip install torch transformers==5.24.0 accelerate safetensors
    TORCHDYNAMO_DISABLE=1 python tests/interop/bitnet/make.py

online      latent weights in bfloat16, quantised at each use
offline     codes in 2 bits and scales that multiply (as BitNet b1.58 2B4T has them)
codes       the same codes, one in a float, as transformers saves what it has loaded
reciprocal  codes in 2 bits and scales that divide (transformers' older class of linear layers)
dense       no quantiser at all
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import BitLinear, pack_weights

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "hidden_act": "relu2", "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
QUANTISATION = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "codes": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "reciprocal": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "dense": None,
}
IDS = torch.tensor([[1, 5, 17, 60, 33, 2, 9, 9, 41, 12, 0, 58]])


def masters() -> dict[str, torch.Tensor]:
    """Random weights, norms that are not one, in bfloat16."""
    torch.manual_seed(0)
    state = BitNetForCausalLM(BitNetConfig(**SIZES)).state_dict()
    state.pop("lm_head.weight")
    noise = lambda name, a: 1 + torch.randn(a.shape) / 8 if "norm" in name else torch.randn(a.shape) / 16
    return {name: noise(name, a).to(torch.bfloat16) for name, a in state.items()}


def stored(kind: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a folder."""
    found = {}
    for name, weight in weights.items():
        if "proj" not in name or kind in ("online", "dense"):
            found[name] = weight
            continue
        scale = weight.float().abs().mean()
        codes = (weight.float() / scale).round().clamp(-1, 1)
        found[name] = codes.to(torch.bfloat16) if kind == "codes" else pack_weights(codes.clone())
        value = 1 / scale if kind == "reciprocal" else scale
        found[name.replace("weight", "weight_scale")] = value.reshape(1).to(torch.bfloat16)
    return found


def make(kind: str) -> None:
    folder = HERE / kind
    folder.mkdir(exist_ok=True)
    config = {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"], **SIZES}
    if QUANTISATION[kind]:
        config["quantization_config"] = {"quant_method": "bitnet", **QUANTISATION[kind]}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(stored(kind, masters()), folder / "model.safetensors", metadata={"format": "pt"})
    model = BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():  # what was stored as codes has come in bfloat16
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: a.float() for name, a in tensors.items() if a is not None and a.is_floating_point()})
        if isinstance(module, BitLinear):
            module.dtype = torch.float32
    with torch.no_grad():
        np.save(folder / "logits.npy", model(IDS).logits[0].numpy())


if __name__ == "__main__":
    for kind in QUANTISATION:
        make(kind)
