"""Define the same GPT in its usual form: eager fp32, with dropout in attention too."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt_core import GPTConfig


class PlainBlock(nn.Module):
    """A transformer block that computes its attention weights as a tensor."""

    def __init__(self, config: GPTConfig, p: float) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(C, 4 * C, bias=False), nn.GELU(), nn.Linear(4 * C, C, bias=False)
        )
        self.attention_dropout, self.dropout_1, self.dropout_2 = (nn.Dropout(p) for _ in range(3))
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size).tril())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:T, :T] == 0, -math.inf)
        y = self.attention_dropout(scores.softmax(-1)) @ v
        x = x + self.dropout_1(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.dropout_2(self.mlp(self.ln_2(x)))


class PlainGPT(nn.Module):
    """The reference model. It takes int64 (B, T) and returns logits and loss."""

    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(PlainBlock(config, dropout) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.blocks(self.drop(self.wte(idx) + self.wpe(positions)))
        logits = self.ln_f(x) @ self.wte.weight.T
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def eager_step(
    model: nn.Module, loss: Callable[[], Tensor], learning_rate: float = 1e-3
) -> Callable[[], None]:
    """Return a function that takes one training step with clipping and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
