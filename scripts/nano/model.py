"""nano's configuration and a training forward that is fast on CPU cores.

In: a transformers Qwen3ForCausalLM with float32 weights and packed rows of token ids.
Out: the summed next-token loss, with gradients on the model's own parameters.
The matrix products run in bfloat16; the weights stay float32.  Same function as transformers' forward.
Refuses to know: data files, optimisers, checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

HALF = torch.bfloat16


def nano_config(vocab_size: int, context: int, eos: int, pad: int) -> Qwen3Config:
    """The architecture that ships: 5.8 M parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )


def fresh_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """Random float32 weights; output projections start smaller, as depth asks."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def rope_tables(length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [length, dim], halves repeated."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None]
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def document_bias(documents: Tensor) -> Tensor:
    """Additive [rows, 1, length, length] mask: causal, and never across documents."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (documents[:, :, None] == documents[:, None, :]) & causal
    return torch.zeros(seen.shape, dtype=HALF).masked_fill_(~seen, -30000.0)[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32, back in bfloat16."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(HALF)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [rows, length, heads, dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x.float() * cos + turned.float() * sin).to(HALF)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Plain grouped-query attention with materialised scores: quicker than SDPA for short rows."""
    rows, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    queries = q.permute(0, 2, 1, 3).reshape(rows * kv_heads, heads // kv_heads * length, dim)
    keys = k.permute(0, 2, 3, 1).reshape(rows * kv_heads, dim, length)
    values = v.permute(0, 2, 1, 3).reshape(rows * kv_heads, length, dim)
    scores = torch.bmm(queries, keys).view(rows, heads, length, length)
    weights = torch.softmax((scores.float() * dim**-0.5 + bias.float()), -1).to(HALF)
    mixed = torch.bmm(weights.view(rows * kv_heads, -1, length), values)
    return mixed.view(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, heads * dim)


def layer_forward(
    x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float, w: tuple[Tensor, ...]
) -> Tensor:
    """One Qwen3 decoder layer; `w` are its weights in the order of `layer_weights`."""
    norm1, wq, wk, wv, norm_q, norm_k, wo, norm2, gate, up, down = w
    rows, length, _ = x.shape
    h = rms_norm(x, norm1, eps)
    qkv = F.linear(h, torch.cat([wq, wk, wv]).to(HALF))
    dim = wq.shape[0] // heads
    q, k, v = qkv.view(rows, length, -1, dim).split([heads, kv_heads, kv_heads], 2)
    q = rotate(rms_norm(q, norm_q, eps), cos, sin)
    k = rotate(rms_norm(k, norm_k, eps), cos, sin)
    x = x + F.linear(attention(q, k, v, bias), wo.to(HALF))
    h = rms_norm(x, norm2, eps)
    gated = F.linear(h, torch.cat([gate, up]).to(HALF))
    a, b = gated.split(gate.shape[0], -1)
    return x + F.linear(F.silu(a) * b, down.to(HALF))


def layer_weights(layer: Any) -> tuple[Tensor, ...]:
    """The weights of one transformers layer, in the order `layer_forward` takes them."""
    attn, mlp = layer.self_attn, layer.mlp
    modules = (layer.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj, attn.q_norm, attn.k_norm, attn.o_proj)
    modules += (layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return tuple(module.weight for module in modules)


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy over a tied head, whose gradient is made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """`x` [n, hidden] bfloat16, `head` [vocab, hidden] float32, `labels` [n] with -100 for none."""
        weight = head.to(HALF)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(head)
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, x.shape[0], chunk):
            part, wanted = x[start : start + chunk], labels[start : start + chunk]
            valid = wanted >= 0
            logs = torch.log_softmax(F.linear(part, weight).float(), -1)
            index = wanted.clamp_min(0)[:, None]
            total -= (logs.gather(1, index)[:, 0] * valid).sum()
            slope = logs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            slope = (slope * valid[:, None]).to(HALF)
            grad_x[start : start + chunk] = slope @ weight
            grad_w += slope.T @ part
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the gradients made in the forward."""
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(HALF), grad_w * grad, None, None


def loss_sum(model: Qwen3ForCausalLM, ids: Tensor, documents: Tensor, labels: Tensor, layer_fn: Any) -> Tensor:
    """Summed loss of `labels` (already shifted) over packed rows; `layer_fn` is layer_forward or its compile."""
    config = model.config
    theta = float(config.rope_parameters["rope_theta"])
    cos, sin = (t[None, :, None, :] for t in rope_tables(ids.shape[1], config.head_dim, theta))
    bias = document_bias(documents)
    head = model.model.embed_tokens.weight
    x = F.embedding(ids, head).to(HALF)
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    for layer in model.model.layers:
        x = layer_fn(x, bias, cos, sin, heads, kv_heads, eps, layer_weights(layer))
    x = rms_norm(x, model.model.norm.weight, eps)
    return ChunkedLoss.apply(x.reshape(-1, x.shape[-1]), head, labels.reshape(-1), 1024)
