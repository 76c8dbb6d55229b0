"""What the paper adds inside the backbones: the dense block, the text adapter and the dense aligner, as plain modules.

Source: DETRIS, arXiv 2501.08580, section 3; official file `model/adapter.py`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
DENSE_BLOCK_NORM_EPS = 1e-3


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size of its input, batch norm and ReLU.

    Shapes: `(N, in_channels, *size)` to `(N, out_channels, *size)`, with one or two spatial `dimensions`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dimensions: int = 2,
        bias: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.conv = CONVOLUTION[dimensions](
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self.norm = BATCH_NORM[dimensions](out_channels, eps=eps)
        self.activation = nn.ReLU(inplace=True)


class DenseBlock(nn.Module):
    """Three densely connected branches of convolutions, which see 1, 3 and 5 positions at a time.

    Shapes: `(N, dim, L)` to the same for text (`dimensions=1`), `(N, dim, g, g)` to the same for images.
    """

    def __init__(self, dim: int, dimensions: int):
        super().__init__()

        def conv(in_channels: int, out_channels: int, kernel_size: int) -> ConvNormReLU:
            return ConvNormReLU(
                in_channels, out_channels, kernel_size, dimensions, bias=True, eps=DENSE_BLOCK_NORM_EPS
            )

        half, quarter, bottleneck = dim // 2, dim // 4, dim // 16
        self.branch1 = conv(dim, half, 1)
        self.branch2 = nn.Sequential(conv(dim + half, bottleneck, 1), conv(bottleneck, quarter, 3))
        self.branch3 = nn.Sequential(conv(dim + half + quarter, bottleneck, 1), conv(bottleneck, quarter, 5))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first = self.branch1(hidden_states)
        second = self.branch2(torch.cat([hidden_states, first], dim=1))
        third = self.branch3(torch.cat([hidden_states, first, second], dim=1))
        return torch.cat([first, second, third], dim=1)


class TextAdapter(nn.Module):
    """Adapter of a text layer; `(N, L, C)` to `(N, L, C)`.

    Its convolutions read padding positions too, so the result depends on `L` (official `TextAdapter`).
    """

    def __init__(self, hidden_size: int, dim: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, dim)
        self.dense = DenseBlock(dim, dimensions=1)
        self.up = nn.Linear(dim, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.down(hidden_states).relu()  # (N, L, d)
        start, words = hidden_states[:, :1], hidden_states[:, 1:]
        words = self.dense(words.transpose(1, 2)).transpose(1, 2)
        # The start token skips the convolutions but not the sum, so it is doubled, as in the official code.
        return self.up(torch.cat([start, words], dim=1) + hidden_states)


class BatchFirstAttention(nn.MultiheadAttention):
    """Multi-head attention without the copies that PyTorch makes of its inputs and output.

    Shapes: query `(N, Q, d)`, key and value `(N, K, ·)` and `key_padding_mask` `(N, K)`, which is true where a key is
    padding, to `(N, Q, d)`; with `need_weights` also the weights `(N, num_heads, Q, K)`.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self._qkv_same_embed_dim:
            projections = self.in_proj_weight.chunk(3)
        else:
            projections = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        query, key, value = (
            F.linear(states, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((query, key, value), projections, self.in_proj_bias.chunk(3), strict=True)
        )  # (N, num_heads, Q or K, d / num_heads)
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]  # (N, 1, 1, K)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = F.dropout(scores.softmax(dim=3), dropout)
            attended = weights @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (attended, weights) if need_weights else attended


class WordAttention(nn.Module):
    """Attention from image patches to all `L` words of a phrase, padding included (official `CrossAttention`).

    Shapes: patches `(N, g², d)` and words `(N, L, C)` to `(N, g², d)`.
    """

    def __init__(self, dim: int, text_hidden_size: int, attention_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.patch_projection = nn.Linear(dim, attention_dim)
        self.word_projection = nn.Linear(text_hidden_size, attention_dim)
        self.attention = BatchFirstAttention(attention_dim, num_heads, dropout=dropout)
        self.output_projection = nn.Linear(attention_dim, dim)

    def forward(self, patches: torch.Tensor, text_hidden_states: torch.Tensor) -> torch.Tensor:
        query, words = self.patch_projection(patches), self.word_projection(text_hidden_states)
        return self.output_projection(self.attention(query, words, words))


class DenseAligner(nn.Module):
    """Adapter of a vision layer, which mixes the words into the patches; `(N, P, D)` to `(N, P, D)`.

    `P = prefix_length + g²`: the class token and the registers come first and skip convolutions and attention.
    """

    def __init__(
        self,
        hidden_size: int,
        dim: int,
        text_hidden_size: int,
        prefix_length: int,
        attention_dim: int,
        attention_heads: int,
        dropout: float,
    ):
        super().__init__()
        self.prefix_length = prefix_length
        self.down = nn.Linear(hidden_size, dim)
        self.dense = DenseBlock(dim, dimensions=2)
        self.word_attention = WordAttention(dim, text_hidden_size, attention_dim, attention_heads, dropout)
        self.up = nn.Linear(dim, hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states are those of phrases, or of images `(B, P, D)` if `image_index` `(N,)` tells each phrase's."""
        if image_index is not None and self.training:
            # Batch norm counts an image once for each of its phrases.
            hidden_states, image_index = hidden_states.index_select(0, image_index), None
        hidden_states = self.down(hidden_states).relu()  # (N or B, P, d)
        patches = hidden_states[:, self.prefix_length :]
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (N or B, d, g, g)
        # Contiguous, because PyTorch multiplies other layouts in one way if the weights need gradients and in another
        # if they do not, so the last digits could change once adapters are frozen.
        aligned = (self.dense(grid).flatten(2).transpose(1, 2) + patches).contiguous()
        if image_index is not None:
            hidden_states, aligned = hidden_states.index_select(0, image_index), aligned.index_select(0, image_index)
        aligned = self.word_attention(aligned, text_hidden_states)
        prefix = hidden_states[:, : self.prefix_length]
        return self.up(torch.cat([prefix, aligned], dim=1) + hidden_states)
