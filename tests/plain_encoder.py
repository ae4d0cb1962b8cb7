"""CT-CLIP's image tower written down a second time: plainly, slowly, from the description of the architecture alone.

Every step is spelled out, nothing is shared or skipped: the position bias is worked out for every pair of tokens, the
nearest code is picked by a one-hot row per token. It is the reference for truth (tests) and for speed (benchmarks), and
uses none of the project's modules. Legend as in ctclip_model.py: B batch, T h w tokens, C width, N heads, K head width.
"""

import math

import torch
from torch import Tensor

TOWER = "visual_transformer."


def encode(state: dict[str, Tensor], volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights under the published keys, volume (B, 1, D, H, W) -> tokens before the look-up (B, T, h, w, C), code ids
    (B, T, h, w) and latents (B, L), in the type of the volume."""
    state = {key: value.to(volume.dtype) for key, value in state.items() if value.is_floating_point()}
    tokens = tokens_before_codes(state, volume)
    ids, rows = nearest_codes(tokens, state[TOWER + "vq._codebook.embed"][0])
    latent = rows.mean(1).flatten(1) @ state["to_visual_latent.weight"].T
    return tokens, ids, latent / latent.norm(dim=-1, keepdim=True)


def tokens_before_codes(state: dict[str, Tensor], volume: Tensor) -> Tensor:
    patch = math.isqrt(state[TOWER + "to_patch_emb_first_frame.1.weight"].shape[0])
    depth = state[TOWER + "to_patch_emb.1.weight"].shape[0] // patch**2
    B, _, D, H, W = volume.shape
    T, h, w = D // depth, H // patch, W // patch
    rows = [
        volume[:, 0, t * depth : (t + 1) * depth, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].flatten(1)
        for t in range(T)
        for y in range(h)
        for x in range(w)
    ]
    x = layer_norm(torch.stack(rows, 1), state, TOWER + "to_patch_emb.1")
    x = x @ state[TOWER + "to_patch_emb.2.weight"].T + state[TOWER + "to_patch_emb.2.bias"]
    x = layer_norm(x, state, TOWER + "to_patch_emb.3")

    C = x.shape[-1]
    bias = pair_bias(state, h, w)
    x = transformer(state, TOWER + "enc_spatial_transformer", x.reshape(B * T, h * w, C), (B, T, h, w), bias)
    x = x.reshape(B, T, h, w, C).permute(0, 2, 3, 1, 4).reshape(B * h * w, T, C)
    x = transformer(state, TOWER + "enc_temporal_transformer", x, (B, T, h, w), None)
    return x.reshape(B, h, w, T, C).permute(0, 3, 1, 2, 4)


def transformer(
    state: dict[str, Tensor], name: str, x: Tensor, grid: tuple[int, int, int, int], bias: Tensor | None
) -> Tensor:
    depth = len({key[len(name) :].split(".")[2] for key in state if key.startswith(name + ".layers.")})
    for i in range(depth):
        layer = f"{name}.layers.{i}."
        x = x + position_encoding(state, layer + "0.dsconv.", x, grid)
        x = x + attention(state, layer + "1.", x, bias)
        x = x + feedforward(state, layer + "3.", x)
    return layer_norm(x, state, name + ".norm_out")


def position_encoding(state: dict[str, Tensor], name: str, x: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """A 3 x 3 x 3 filter for each channel, over the tokens viewed as (B, T, h, w, C) in whatever order they lie."""
    B, T, h, w = grid
    padded = x.new_zeros(B, T + 2, h + 2, w + 2, x.shape[-1])
    padded[:, 2:, 1:-1, 1:-1] = x.reshape(B, T, h, w, -1)
    result = torch.zeros_like(x.reshape(B, T, h, w, -1)) + state[name + "bias"]
    for t in range(3):
        for y in range(3):
            for z in range(3):
                result = result + padded[:, t : t + T, y : y + h, z : z + w] * state[name + "weight"][:, 0, t, y, z]
    return result.reshape(x.shape)


def attention(state: dict[str, Tensor], name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    K = state[name + "q_scale"].shape[0]

    def heads(rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:2], -1, K).permute(0, 2, 1, 3)  # (b, N, n, K)

    q = heads(layer_norm(x, state, name + "norm") @ state[name + "to_q.weight"].T)
    k, v = (heads(half) for half in (x @ state[name + "to_kv.weight"].T).chunk(2, dim=-1))
    q = q / q.norm(dim=-1, keepdim=True) * state[name + "q_scale"]
    k = k / k.norm(dim=-1, keepdim=True) * state[name + "k_scale"]
    scores = 8 * q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    mixed = scores.softmax(-1) @ v
    return mixed.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ state[name + "to_out.weight"].T


def feedforward(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    value, gate = (layer_norm(x, state, name + "0") @ state[name + "1.weight"].T).chunk(2, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return (value * gelu) @ state[name + "4.weight"].T


def pair_bias(state: dict[str, Tensor], h: int, w: int) -> Tensor:
    """(N, h*w, h*w), from the offset of every pair of in-plane tokens."""
    name = TOWER + "spatial_rel_pos_bias.net."
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2)
    offsets = (places[:, None] - places[None, :]).to(state[name + "2.weight"].dtype)
    x = offsets.sign() * torch.log(offsets.abs() + 1)
    for layer in ("0.0", "1.0"):
        x = x @ state[f"{name}{layer}.weight"].T + state[f"{name}{layer}.bias"]
        x = torch.where(x > 0, x, 0.1 * x)
    return (x @ state[name + "2.weight"].T + state[name + "2.bias"]).permute(2, 0, 1)


def nearest_codes(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, T, h, w) and rows of the codebook (B, T, h, w, C)."""
    similarity = cosines(tokens, codebook)
    ids = similarity.argmax(-1)
    one_hot = torch.zeros_like(similarity).scatter_(-1, ids[..., None], 1)
    return ids, one_hot @ codebook


def cosines(tokens: Tensor, codebook: Tensor) -> Tensor:
    """(..., codes)"""
    return unit(tokens) @ unit(codebook).T


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Both spellings of the checkpoint: weight and bias, gamma and beta."""
    weight = state.get(name + ".weight", state.get(name + ".gamma"))
    bias = state.get(name + ".bias", state.get(name + ".beta"))
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias
