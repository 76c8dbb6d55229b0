"""The adapters written once more, from the paper's formulas, to compare the modules with."""

import math

import torch
from torch.nn import functional as F


def weights_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def linear(hidden_states, weights, name):
    return hidden_states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def conv_norm_relu_twin(hidden_states, weights, name, training=False):
    weight, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
    convolve = {3: F.conv1d, 4: F.conv2d}[weight.ndim]
    hidden_states = convolve(hidden_states, weight, bias, padding=weight.shape[-1] // 2)
    mean, variance = weights[f"{name}.norm.running_mean"], weights[f"{name}.norm.running_var"]
    if training:
        others = [axis for axis in range(hidden_states.ndim) if axis != 1]
        mean, variance = hidden_states.mean(others), hidden_states.var(others, unbiased=False)
    mean, variance, gain, shift = (
        values.reshape(-1, *[1] * (hidden_states.ndim - 2))
        for values in (mean, variance, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
    )
    return (gain * (hidden_states - mean) / (variance + 1e-3).sqrt() + shift).clamp_min(0)


def dense_block_twin(hidden_states, weights, training=False):
    branch1 = conv_norm_relu_twin(hidden_states, weights, "dense.branch1", training)
    branch2 = torch.cat([hidden_states, branch1], 1)
    for step in (0, 1):
        branch2 = conv_norm_relu_twin(branch2, weights, f"dense.branch2.{step}", training)
    branch3 = torch.cat([hidden_states, branch1, branch2], 1)
    for step in (0, 1):
        branch3 = conv_norm_relu_twin(branch3, weights, f"dense.branch3.{step}", training)
    return torch.cat([branch1, branch2, branch3], 1)


def attention_twin(query, key, value, heads, mask=0.0):
    """Softmax attention, computed head by head."""
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width) + mask
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        outputs.append(scores / scores.sum(-1, keepdim=True) @ value[..., part])
    return torch.cat(outputs, -1)


def text_adapter_twin(hidden_states, weights, training=False):
    reduced = linear(hidden_states, weights, "down").clamp_min(0)
    words = dense_block_twin(reduced[:, 1:].transpose(1, 2), weights, training).transpose(1, 2)
    return linear(torch.cat([reduced[:, :1], words], 1) + reduced, weights, "up")


def dense_aligner_twin(hidden_states, words, weights, prefix_length, heads, training=False):
    reduced = linear(hidden_states, weights, "down").clamp_min(0)
    prefix, patches = reduced[:, :prefix_length], reduced[:, prefix_length:]
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)  # row by row
    patches = dense_block_twin(grid, weights, training).permute(0, 2, 3, 1).reshape(patches.shape) + patches
    patches = linear(patches, weights, "word_attention.patch_projection")
    words = linear(words, weights, "word_attention.word_projection")
    weight, bias = (weights[f"word_attention.attention.in_proj_{leaf}"].chunk(3) for leaf in ("weight", "bias"))
    query, key, value = (states @ w.T + b for states, w, b in zip((patches, words, words), weight, bias))
    attended = linear(attention_twin(query, key, value, heads), weights, "word_attention.attention.out_proj")
    aligned = linear(attended, weights, "word_attention.output_projection")
    return linear(torch.cat([prefix, aligned], 1) + reduced, weights, "up")
