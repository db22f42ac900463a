"""Sampling from a GPT without recomputing the past."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor

from gpt_core.decode import Decoder
from gpt_core.model import GPT, KVCache, uncompiled

WINDOWS = ("shift", "exact")
ENDED = -1  # in the place of a token that a row which has ended no longer gets

Prompts = Tensor | Sequence[Tensor]
Stop = int | str | Sequence[int]


@dataclass(frozen=True)
class _Sampler:
    """How one token is drawn from logits; the filters apply in the order of the fields."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    generator: torch.Generator | None

    def __call__(self, logits: Tensor) -> Tensor:
        """int64 (B,) from logits (B, vocab_size)."""
        if self.temperature < torch.finfo(torch.float32).tiny:  # 0, or 0 in fp32
            return logits.argmax(-1)
        logits = logits.float()
        # the likeliest at zero, so that a tiny temperature divides nothing into infinity
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.size(-1):
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # of those before, never the first
            beyond[:, 0] = False
            probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        if self.min_p > 0.0:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        # the first of independent exponential clocks with these rates rings for each token with
        # its (not yet normalised) probability; a third of the time of torch.multinomial
        clocks = torch.empty_like(probabilities).exponential_(generator=self.generator)
        smallest_clock = torch.finfo(clocks.dtype).tiny  # 0 / 0 would win
        return (probabilities / clocks.clamp_(min=smallest_clock)).argmax(-1)


class _Stops:
    """Whether the tokens written so far end with one of the sequences or strings that stop."""

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
        # a token has at least one byte and a character of UTF-8 at most four
        self.reach = max((4 * (len(item) + 1) for item in self.strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.strings or self.sequences)

    def reached(self, written: list[int]) -> bool:
        if any(written[-len(ids) :] == ids for ids in self.sequences):
            return True
        if not self.strings or self.decode is None:
            return False
        tail = self.decode(written[-self.reach :])
        return any(item in tail for item in self.strings)


class _Rows:
    """The tokens of a batch, each row at its own length, and the cache of what was computed."""

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
        self.pending: Tensor | None = None  # (B,), written but not yet in the cache

    def logits(self) -> Tensor:
        """Of the next token of each row, (B, vocab_size)."""
        if self.pending is None:
            return self._prefill(range(len(self.lengths)), self.block_size)
        full = [row for row, length in enumerate(self.cache.lengths) if length == self.block_size]
        if len(full) == len(self.lengths):
            return self._refill(full)
        # The decoder steps all rows at once and needs a free position in each. A full row drops
        # its newest token here, and is refilled right after the step.
        self.cache.truncate([self.block_size - 1] * len(self.lengths))
        logits = self.decoder(self.pending)
        if full:
            logits[full] = self._refill(full)
        return logits

    def _refill(self, rows: Sequence[int]) -> Tensor:
        keep = self.block_size if self.exact else max(1, self.block_size // 2)
        return self._prefill(rows, keep)

    def _prefill(self, rows: Sequence[int], keep: int) -> Tensor:
        """Cache the newest `keep` tokens of these rows anew; return (len(rows), vocab_size)."""
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
        # Shorter rows are padded at their end. Attention is causal, so no real token sees padding.
        x = self.model.transformer(idx, cache)  # (len(rows), T, C)
        cache.truncate(lengths)
        if cache is not self.cache:
            self.cache.replace_rows(rows, cache)
        last = torch.tensor(lengths, device=idx.device) - 1
        logits: Tensor = self.model.lm_head(x[torch.arange(len(rows), device=idx.device), last])
        return logits

    def append(self, tokens: Tensor) -> None:
        """Write one token a row, int64 (B,)."""
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
    """New tokens, int64 (B, 1), one at a time.

    The prompts pass through the model once; each further token costs one column. A row that has
    ended yields -1; the stream ends with its last row.

    Args:
        model: in evaluation or training mode; it is put into evaluation mode.
        prompt: int64 (B, T) with T >= 1, or a list of B prompts (T_b,) of different lengths; only
            the newest `block_size` tokens of each are seen. With temperature 0, a row is written
            as it would be alone.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest only; 0 draws from all.
        top_p: draw from the likeliest that together reach this probability (nucleus sampling,
            arXiv 1904.09751).
        min_p: draw only from those at least this fraction as likely as the likeliest
            (arXiv 2407.01082).
        stop: ids, sequences of ids, or strings, after which a row ends; what stopped it is the
            last of what is written. Prompts are not searched.
        decode: ids to text, at least one byte an id; strings in `stop` need it.
        seed: of the draws; None uses torch's global generator.
        window: what happens where `block_size` tokens are full. "shift" passes the newest half
            through again and goes on from there, so that the cost of a token stays flat. "exact"
            passes the newest `block_size` tokens through for each further token, as nanoGPT does.

    Raises:
        ValueError: for an empty prompt, an id that is not in the vocabulary, or a value out of
            range.
    """
    prompts = _checked(uncompiled(model), prompt)
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
    stops = _Stops(stop, decode)
    model = uncompiled(model).eval()
    generator = None
    if seed is not None:
        generator = torch.Generator(model.transformer.wte.weight.device).manual_seed(seed)
    sampler = _Sampler(temperature, top_k, top_p, min_p, generator)
    return _stream(_Rows(model, prompts, window), max_new_tokens, sampler, stops)


def _checked(model: GPT, prompt: Prompts) -> list[Tensor]:
    if isinstance(prompt, Tensor) and prompt.dim() != 2:
        raise ValueError(
            f"the prompt has shape {tuple(prompt.shape)}; (B, T) with T >= 1 is needed, "
            "or a list of prompts (T,)"
        )
    prompts = list(prompt)
    if not prompts:
        raise ValueError("there is no prompt")
    for row, one in enumerate(prompts):
        if not isinstance(one, Tensor):
            raise ValueError(f"prompt {row} is a {type(one).__name__}; a tensor of ids is needed")
        if one.dim() != 1 or len(one) == 0:
            raise ValueError(f"prompt {row} has shape {tuple(one.shape)}; T >= 1 is needed")
        if one.is_floating_point() or one.dtype == torch.bool:
            raise ValueError(f"prompt {row} is {one.dtype}; ids are whole numbers")
        one = prompts[row] = one.long()
        size = model.config.vocab_size
        if one.min() < 0 or one.max() >= size:
            wrong = next(int(i) for i in one if not 0 <= i < size)
            raise ValueError(
                f"prompt {row} holds the id {wrong}; the vocabulary has 0 to {size - 1}"
            )
    return prompts


@torch.inference_mode()
def _stream(rows: _Rows, count: int, sampler: _Sampler, stops: _Stops) -> Iterator[Tensor]:
    written: list[list[int]] = [[] for _ in rows.lengths]
    ended = [False] * len(rows.lengths)
    for _ in range(count):
        tokens = sampler(rows.logits())
        rows.append(tokens)
        new = tokens[:, None]
        if stops:
            # those that ended before this token; the one that ends a row is still written
            new = new.masked_fill(torch.tensor(ended, device=new.device)[:, None], ENDED)
            for row, token in enumerate(tokens.tolist()):
                written[row].append(token)
                ended[row] = ended[row] or stops.reached(written[row])
        yield new
        if all(ended):
            return


class Settings(TypedDict, total=False):
    """The keywords of `stream`, which explains them."""

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
    model: GPT, prompt: Tensor, max_new_tokens: int, **settings: Unpack[Settings]
) -> Tensor: ...
@overload
def generate(
    model: GPT, prompt: Sequence[Tensor], max_new_tokens: int, **settings: Unpack[Settings]
) -> list[Tensor]: ...
def generate(
    model: GPT, prompt: Prompts, max_new_tokens: int, **settings: Unpack[Settings]
) -> Tensor | list[Tensor]:
    """The prompt and what the model writes after it.

    Args:
        model, prompt, max_new_tokens, **settings: those of `stream`: temperature, top_k, top_p,
            min_p, stop, decode, seed, window.

    Returns:
        For a tensor (B, T), int64 (B, T + n): n is `max_new_tokens`, or less where every row was
        stopped before; a row that ended earlier than others is filled with -1. For a list of
        prompts, a list of as many int64 tensors, each as long as its row came to be.

    Raises:
        ValueError: as `stream`.
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
