"""Generate text with a key-value cache.

`GPT.generate` is a simple version without a cache. It recomputes all positions for each new token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor

from gpt_core.decode import Decoder
from gpt_core.model import GPT, KVCache, uncompiled

WINDOWS = ("shift", "exact")
ENDED = -1  # takes the place of a token in a row that has already ended

Prompts = Tensor | Sequence[Tensor]
Stop = int | str | Sequence[int]


@dataclass(frozen=True)
class _Sampler:
    """A sampler that draws one token per row.

    It applies the temperature first, and then the filters top_k, top_p and min_p in this order.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    generator: torch.Generator | None

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw tokens, int64 (B,), from logits (B, vocab_size)."""
        if self.temperature < torch.finfo(torch.float32).tiny:  # 0, or below fp32's normal numbers
            return logits.argmax(-1)
        logits = logits.float()
        # shift the largest logit to 0, so that a division by a tiny temperature cannot give +inf
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.size(-1):
            kth_largest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth_largest, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            # Drop a token if the probabilities of all more likely tokens already sum to top_p.
            # Never drop the most likely token.
            drop = ordered.cumsum(-1) - ordered >= self.top_p
            drop[:, 0] = False
            probabilities = probabilities.masked_fill(drop.scatter(-1, order, drop), 0.0)
        if self.min_p > 0.0:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        # Divide each probability by an exponential random number and take the largest quotient.
        # This picks each token in proportion to its probability, even if the probabilities do not
        # sum to 1. It takes a third of the time of torch.multinomial.
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        smallest = torch.finfo(noise.dtype).tiny  # 0 / 0 would be NaN, and argmax would pick it
        return (probabilities / noise.clamp_(min=smallest)).argmax(-1)


class _StopCondition:
    """A check for stop sequences and stop strings. A row ends after it has written one of them."""

    def __init__(self, stop: Sequence[Stop], decode: Callable[[list[int]], str] | None) -> None:
        if isinstance(stop, str | int):
            stop = [stop]
        self.strings = [item for item in stop if isinstance(item, str)]
        self.sequences = [
            [int(i) for i in item] if isinstance(item, Sequence) else [int(item)]
            for item in stop
            if not isinstance(item, str)
        ]
        if any(not item for item in (*self.strings, *self.sequences)):
            raise ValueError(f"stop is {stop!r}; it may not hold an empty string or sequence")
        if self.strings and decode is None:
            raise ValueError(f"stop holds the string {self.strings[0]!r}, which needs `decode`")
        self.decode = decode
        # To find every stop string, it is enough to search this many tokens at the end of the text.
        # A UTF-8 character has at most four bytes, and each token has at least one byte. A string
        # of n characters therefore spans at most 4 n tokens. One more character is a margin.
        self.tail = max((4 * (len(item) + 1) for item in self.strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.strings or self.sequences)

    def reached(self, written: list[int]) -> bool:
        """Return whether a row must stop after it has written these tokens."""
        if any(written[-len(ids) :] == ids for ids in self.sequences):
            return True
        if not self.strings or self.decode is None:
            return False
        text = self.decode(written[-self.tail :])
        return any(item in text for item in self.strings)


class _Rows:
    """The tokens in a batch of rows with different lengths, and their key-value cache."""

    def __init__(self, model: GPT, prompts: list[Tensor], window: str) -> None:
        self.model = model
        self.exact = window == "exact"
        self.block_size = model.config.block_size
        device = model.transformer.wte.weight.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.ids = torch.zeros(len(prompts), max(self.lengths), dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = prompt
        self.cache = KVCache(model.config, len(prompts), like=model.transformer.wte.weight)
        self.decoder = Decoder(model, self.cache)
        self.pending: Tensor | None = None  # (B,), the newest tokens, not yet in the cache

    def logits(self) -> Tensor:
        """Compute the logits (B, vocab_size) of the next token in each row."""
        if self.pending is None:
            return self._prefill(range(len(self.lengths)), self.block_size)
        full = [row for row, length in enumerate(self.cache.lengths) if length == self.block_size]
        if len(full) == len(self.lengths):
            return self._refill(full)
        # The decoder adds a token to all rows at once, so each row needs a free position. A full
        # row therefore drops its newest token from the cache before the step. After the step,
        # `_refill` computes the cache and the logits of this row again.
        self.cache.truncate([self.block_size - 1] * len(self.lengths))
        logits = self.decoder(self.pending)
        if full:
            logits[full] = self._refill(full)
        return logits

    def _refill(self, rows: Sequence[int]) -> Tensor:
        keep = self.block_size if self.exact else max(1, self.block_size // 2)
        return self._prefill(rows, keep)

    def _prefill(self, rows: Sequence[int], keep: int) -> Tensor:
        """Replace the cached tokens of these rows by the newest `keep` tokens of each row.

        Returns:
            The logits of the next token, (len(rows), vocab_size).
        """
        lengths = [min(self.lengths[row], keep) for row in rows]
        idx = self.ids.new_zeros(len(rows), max(lengths))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            end = self.lengths[row]
            idx[i, :length] = self.ids[row, end - length : end]
        if len(rows) == len(self.lengths):
            cache = self.cache
            cache.truncate([0] * len(rows))
        else:
            cache = KVCache(self.model.config, len(rows), like=self.cache.keys)
        # Shorter rows are padded at the end. Attention is causal, so no real token sees padding.
        x = self.model.transformer(idx, cache)  # (len(rows), T, C)
        cache.truncate(lengths)
        if cache is not self.cache:
            self.cache.replace_rows(rows, cache)
        last = torch.tensor(lengths, device=idx.device) - 1
        logits: Tensor = self.model.lm_head(x[torch.arange(len(rows), device=idx.device), last])
        return logits

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row. `tokens` is int64 (B,)."""
        if max(self.lengths) == self.ids.size(1):
            self.ids = torch.cat((self.ids, torch.zeros_like(self.ids)), dim=1)
        if min(self.lengths) == max(self.lengths):
            self.ids[:, self.lengths[0]] = tokens
        else:
            rows = torch.arange(len(self.lengths), device=self.ids.device)
            self.ids[rows, torch.tensor(self.lengths, device=self.ids.device)] = tokens
        self.lengths = [length + 1 for length in self.lengths]
        self.pending = tokens


def stream(
    model: GPT,
    prompt: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[Stop] = (),
    decode: Callable[[list[int]], str] | None = None,
    seed: int | None = None,
    window: str = "shift",
) -> Iterator[Tensor]:
    """Generate tokens and yield each as soon as it is drawn.

    The prompts pass through the model once. After that, each step computes only one new token per
    row, until a row has `block_size` tokens in the cache (see `window`).

    Args:
        model: the model. It is put into evaluation mode.
        prompt: int64 (B, T) with T >= 1, or a list of B prompts (T_b,) of different lengths. The
            model sees only the newest `block_size` tokens of each prompt. At temperature 0, a
            prompt gives the same tokens in a batch as it gives alone.
        max_new_tokens: number of tokens to generate for each row.
        temperature: a number that divides the logits. 0 always takes the most likely token.
        top_k: draw only from the k most likely tokens. 0 means all tokens.
        top_p: draw only from the smallest set of most likely tokens whose probabilities sum to at
            least `top_p` (nucleus sampling, arXiv 1904.09751).
        min_p: draw only from tokens with a probability of at least `min_p` times the probability
            of the most likely token (arXiv 2407.01082).
        stop: token ids, sequences of token ids, or strings. A row ends after it has written one of
            these stops. The tokens of the stop are yielded too. A stop inside a prompt has no
            effect.
        decode: a function from a list of token ids to text. It is required if `stop` contains
            strings. Each token must become at least one byte of text, because only the newest
            tokens of a row are searched for a stop string.
        seed: seed for the random draws. None uses torch's global generator.
        window: what to do when a row has `block_size` tokens in the cache. "shift" computes the
            newest half of these tokens again and continues with them, so the average cost of a
            token stays constant. "exact" computes the newest `block_size` tokens again for each
            further token, as nanoGPT does.

    Yields:
        int64 (B, 1), which holds one new token for each row, or -1 for a row that has already
        ended. The stream ends early if all rows have ended.

    Raises:
        ValueError: if a prompt is empty, a token id is not in the vocabulary, or a setting is out
            of range. The call of `stream` raises the error, before a token is requested.
    """
    model = uncompiled(model)
    prompts = _checked(model, prompt)
    if not temperature >= 0.0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p is {min_p}; it must be at least 0 and at most 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if window not in WINDOWS:
        raise ValueError(f"window is {window!r}; allowed are {', '.join(WINDOWS)}")
    stops = _StopCondition(stop, decode)
    model.eval()
    generator = None
    if seed is not None:
        generator = torch.Generator(model.transformer.wte.weight.device).manual_seed(seed)
    sampler = _Sampler(temperature, top_k, top_p, min_p, generator)
    return _stream(_Rows(model, prompts, window), max_new_tokens, sampler, stops)


def _checked(model: GPT, prompt: Prompts) -> list[Tensor]:
    """Return the prompts as int64 tensors (T_b,), or raise a ValueError if they are invalid."""
    if isinstance(prompt, Tensor) and prompt.dim() != 2:
        raise ValueError(
            f"the prompt has shape {tuple(prompt.shape)}; it must be (B, T) with T >= 1, "
            "or a list of prompts (T,)"
        )
    prompts = list(prompt)
    if not prompts:
        raise ValueError("there is no prompt; at least one is needed")
    for row, one in enumerate(prompts):
        if not isinstance(one, Tensor):
            raise ValueError(f"prompt {row} is a {type(one).__name__}; it must be a tensor of ids")
        if one.dim() != 1 or len(one) == 0:
            raise ValueError(f"prompt {row} has shape {tuple(one.shape)}; it must be (T,), T >= 1")
        if one.is_floating_point() or one.dtype == torch.bool:
            raise ValueError(f"prompt {row} is {one.dtype}; ids must be whole numbers")
        one = prompts[row] = one.long()
        size = model.config.vocab_size
        if one.min() < 0 or one.max() >= size:
            wrong = next(int(i) for i in one if not 0 <= i < size)
            raise ValueError(f"prompt {row} holds the id {wrong}; allowed are 0 to {size - 1}")
    return prompts


@torch.inference_mode()
def _stream(rows: _Rows, count: int, sampler: _Sampler, stops: _StopCondition) -> Iterator[Tensor]:
    written: list[list[int]] = [[] for _ in rows.lengths]
    ended = [False] * len(rows.lengths)
    for _ in range(count):
        tokens = sampler(rows.logits())
        rows.append(tokens)
        new = tokens[:, None]
        if stops:
            # mask rows that have already ended; the token that ends a row is not masked
            new = new.masked_fill(torch.tensor(ended, device=new.device)[:, None], ENDED)
            for row, token in enumerate(tokens.tolist()):
                written[row].append(token)
                ended[row] = ended[row] or stops.reached(written[row])
        yield new
        if all(ended):
            return


class SamplingSettings(TypedDict, total=False):
    """The keyword arguments of `stream`. The docstring of `stream` explains them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: Sequence[Stop]
    decode: Callable[[list[int]], str] | None
    seed: int | None
    window: str


@overload
def generate(
    model: GPT, prompt: Tensor, max_new_tokens: int, **settings: Unpack[SamplingSettings]
) -> Tensor: ...
@overload
def generate(
    model: GPT, prompt: Sequence[Tensor], max_new_tokens: int, **settings: Unpack[SamplingSettings]
) -> list[Tensor]: ...
def generate(
    model: GPT, prompt: Prompts, max_new_tokens: int, **settings: Unpack[SamplingSettings]
) -> Tensor | list[Tensor]:
    """Generate tokens after the prompts, and return each prompt together with its new tokens.

    Args:
        model: the model. It is put into evaluation mode.
        prompt: int64 (B, T) with T >= 1, or a list of B prompts (T_b,) of different lengths.
        max_new_tokens: number of tokens to generate for each row.
        **settings: temperature, top_k, top_p, min_p, stop, decode, seed and window, as in `stream`.

    Returns:
        If `prompt` is a tensor (B, T): an int64 tensor (B, T + n). n is `max_new_tokens`, or less
        if all rows ended earlier. Shorter rows are filled up with -1. If `prompt` is a list: a list
        of B int64 tensors, without -1 at the end.

    Raises:
        ValueError: in the same cases as `stream`.
    """
    if not isinstance(prompt, Tensor):
        prompt = list(prompt)
    new = list(stream(model, prompt, max_new_tokens, **settings))
    device = uncompiled(model).transformer.wte.weight.device
    if isinstance(prompt, Tensor):
        return torch.cat((prompt.to(device), *new), dim=1)
    columns = torch.cat(new, dim=1) if new else torch.empty(len(prompt), 0, dtype=torch.int64)
    return [
        torch.cat((one.to(device), row[row != ENDED].to(device)))
        for one, row in zip(prompt, columns, strict=True)
    ]
