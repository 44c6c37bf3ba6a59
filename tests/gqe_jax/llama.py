"""An independent Llama and Qwen3 in float64 NumPy, from Hugging Face's config and tensor names."""

import math

import numpy as np


def frequencies(config):
    """Radians a position of each pair, one pair at a time."""
    rope = config.get("rope_scaling") or {}
    found = []
    for i in range(config["head_dim"] // 2):
        frequency = config["rope_theta"] ** (-2 * i / config["head_dim"])
        wavelength = 2 * math.pi / frequency
        if rope.get("rope_type") == "linear":
            frequency /= rope["factor"]
        if rope.get("rope_type") == "llama3":
            longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
            shortest = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
            if wavelength > longest:
                frequency /= rope["factor"]
            elif wavelength >= shortest:
                smooth = rope["original_max_position_embeddings"] / wavelength
                smooth = (smooth - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        found.append(frequency)
    return np.array(found)


def logits(config, tensors, tokens):
    """[length] token ids → [length, vocab]."""
    weight = lambda name: np.asarray(tensors[f"{name}.weight"], np.float64)  # noqa: E731

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale

    angle = np.arange(len(tokens))[:, None] * frequencies(config)
    turn = np.exp(1j * angle)

    def rotate(x):  # [length, head_dim], pairs half a head apart
        half = x.shape[1] // 2
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["head_dim"]
    x = weight("model.embed_tokens")[tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        h = norm(x, weight(f"{block}input_layernorm"))
        q, k, v = (h @ weight(f"{block}self_attn.{name}_proj").T for name in "qkv")
        outputs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            query = q[:, head * width : (head + 1) * width]
            key = k[:, kv * width : (kv + 1) * width]
            if config["model_type"] == "qwen3":
                query = norm(query, weight(f"{block}self_attn.q_norm"))
                key = norm(key, weight(f"{block}self_attn.k_norm"))
            scores = rotate(query) @ rotate(key).T / math.sqrt(width)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            outputs.append(share @ v[:, kv * width : (kv + 1) * width])
        x = x + np.concatenate(outputs, axis=1) @ weight(f"{block}self_attn.o_proj").T
        h = norm(x, weight(f"{block}post_attention_layernorm"))
        gate = h @ weight(f"{block}mlp.gate_proj").T
        gated = gate / (1 + np.exp(-gate)) * (h @ weight(f"{block}mlp.up_proj").T)
        x = x + gated @ weight(f"{block}mlp.down_proj").T
    x = norm(x, weight("model.norm"))
    return x @ weight("model.embed_tokens" if config["tie_word_embeddings"] else "lm_head").T
