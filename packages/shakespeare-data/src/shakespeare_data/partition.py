"""Who gets which part of a text: the schemes by which federated learning is tried.

A scheme says which stretches of the text each client has, for training and for validation. Parts
are disjoint; what no client has is accounted for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shakespeare_data.corpus import Corpus, Spans, SplitBy, merged, read_only
from shakespeare_data.errors import DataError, whole_number
from shakespeare_data.parts import FORMAT_VERSION, Part, ids_sha256, write_federation
from shakespeare_data.tokenizer import CharTokenizer

Scheme = Literal["contiguous", "iid", "by-play", "by-speaker", "dirichlet", "quantity-skew"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GroupBy = Literal["play", "speaker"]

WINDOW = 1024  # characters that stay together when a text is shuffled
ALPHA = 0.5
_EVEN = 1e9  # an alpha that makes all shares equal to nine digits
_DRAWS = 100  # of a Dirichlet distribution, until no client has too little
_NAMED_SIZES = 8  # smallest clients that an error names


@dataclass(frozen=True)
class PartReport:
    """What one client has."""

    client: int
    train: int  # characters
    val: int  # characters
    speakers: int  # roles of which it has something
    plays: int
    divergence: float  # Jensen-Shannon, in bits, 0 to 1, of its characters from the whole text's


@dataclass(frozen=True, eq=False)
class Partition:
    """A text divided among clients; `partition` makes one."""

    corpus: Corpus = field(repr=False)
    tokenizer: CharTokenizer = field(repr=False)
    scheme: Scheme
    seed: int
    options: Mapping[str, Any]  # those that the scheme uses, and the split
    train: tuple[Spans, ...] = field(repr=False)  # by client, in the text
    val: tuple[Spans, ...] = field(repr=False)

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.train)

    def __getitem__(self, client: int) -> Part:
        """The part of `client`, from 0. Raises `DataError` if there is none."""
        if not 0 <= client < len(self):
            raise DataError(f"partition_id must be from 0 to {len(self) - 1}, it is {client}")
        train, val = (_take(self.ids, side[client]) for side in (self.train, self.val))
        meta = {
            **self._about(),
            "partition_id": int(client),
            "train_length": len(train),
            "val_length": len(val),
            "train_sha256": ids_sha256(train),
            "val_sha256": ids_sha256(val),
            "vocab_size": self.tokenizer.vocab_size,
            "vocab": self.tokenizer.vocab,
        }
        return Part(train, val, self.tokenizer, f"{client} of {len(self)}", meta)

    def __iter__(self) -> Iterator[Part]:
        return (self[client] for client in range(len(self)))

    @property
    def left_out(self) -> int:
        """Characters that no client has."""
        return len(self.corpus.text) - sum(map(_size, (*self.train, *self.val)))

    def report(self) -> list[PartReport]:
        """Sizes, roles and divergence of every client."""
        whole = self._characters(np.array([[0, len(self.corpus.text)]]))
        return [self._describe(client, whole) for client in range(len(self))]

    def write(self, output: str | Path) -> list[Path]:
        """Write all parts and the report below `output`; see `shakespeare_data.parts`.

        All or nothing: an earlier federation there is replaced whole. Returns the parts'
        directories. Raises `DataError` for what is in the way or cannot be written.
        """
        report = [asdict(described) for described in self.report()]
        manifest = {**self._about(), "left_out": self.left_out, "parts": report}
        return write_federation(self, manifest, output)

    def _about(self) -> dict[str, Any]:
        """What every part's `meta.json` and the report say alike."""
        return {
            "format_version": FORMAT_VERSION,
            "scheme": self.scheme,
            "seed": self.seed,
            "options": dict(self.options),
            "num_partitions": len(self),
            "corpus": self.corpus.name,
            "corpus_sha256": self.corpus.sha256,
            "source": self.corpus.source,
            "licence": self.corpus.licence,
            "note": self.corpus.note,
        }

    @cached_property
    def ids(self) -> NDArray[np.uint16]:
        """The whole text as ids, uint16 `(characters,)`, read-only: parts are views of it."""
        return read_only(self.tokenizer.encode(self.corpus.text))

    def _characters(self, spans: Spans) -> NDArray[np.int64]:
        return np.bincount(_take(self.ids, spans), minlength=self.tokenizer.vocab_size)

    def _describe(self, client: int, whole: NDArray[np.int64]) -> PartReport:
        spans = np.concatenate([self.train[client], self.val[client]])
        starts = self.corpus.speech_starts
        first = np.searchsorted(starts, spans[:, 0], side="right") - 1
        last = np.searchsorted(starts, spans[:, 1], side="left")
        speeches = [
            self.corpus.speeches[i]
            for begin, end in zip(first.tolist(), last.tolist(), strict=True)
            for i in range(begin, end)
        ]
        return PartReport(
            client,
            _size(self.train[client]),
            _size(self.val[client]),
            len({speech.role for speech in speeches if speech.speaker}),
            len({speech.play for speech in speeches}),
            jensen_shannon(self._characters(spans), whole),
        )


def partition(
    corpus: Corpus,
    num_partitions: int,
    scheme: Scheme = "contiguous",
    seed: int = 0,
    *,
    tokenizer: CharTokenizer | None = None,
    min_characters: int = 2,
    validation_fraction: float = 0.1,
    split: SplitBy | None = None,
    alpha: float | None = None,
    by: GroupBy | None = None,
    window: int | None = None,
) -> Partition:
    """Divide `corpus` among `num_partitions` clients; equal arguments give equal parts.

    `seed` decides all draws; `"contiguous"` has none, and in `"by-play"` it says only which client
    gets which share.

    The text is first split into training and validation (`Corpus.split_spans`), then each side is
    divided, so that no client trains on what another validates on.

    - `"contiguous"`: equal consecutive stretches, as in Flower's example;
    - `"iid"`: windows of `window` characters (1,024) in random order, dealt in equal amounts;
    - `"quantity-skew"`: the same in unequal amounts, whose proportions are drawn from a symmetric
      Dirichlet distribution of concentration `alpha` (0.5), over `min_characters` for each;
    - `"by-play"`: whole plays, balanced by size; a play for several clients, where there are more
      clients than plays, is cut between speeches, so that a client has one play only;
    - `"by-speaker"`: one role a client, as in LEAF's Shakespeare task (arXiv 1812.01097), drawn at
      random from the roles with enough characters; the other roles are left out;
    - `"dirichlet"`: each play, or with `by="speaker"` each role, is divided in proportions drawn
      from a symmetric Dirichlet distribution of concentration `alpha` (0.5; arXiv 1909.06335); cut
      between speeches.

    `split` is `"end"` for the first three schemes and `"speech"` for the others unless given.
    Every client has at least `min_characters` of each side. The vocabulary is that of `tokenizer`,
    or all characters of the text.

    Raises `DataError` for arguments that are out of range or of another scheme, and for a text that
    cannot give each client enough, naming a client and the sizes.
    """
    if scheme not in SCHEMES:
        raise DataError(f"scheme must be one of {', '.join(SCHEMES)}; it is {scheme!r}")
    num_partitions = whole_number("num_partitions", num_partitions, 1)
    seed = whole_number("seed", seed, 0)
    min_characters = whole_number("min_characters", min_characters, 1)
    options = _options(scheme, {"alpha": alpha, "by": by, "window": window})
    if split is None:
        split = "end" if scheme in ("contiguous", "iid", "quantity-skew") else "speech"
    if split not in get_args(SplitBy):
        raise DataError(f"split must be one of {', '.join(get_args(SplitBy))}; it is {split!r}")
    if max(num_partitions, min_characters) > len(corpus.text):  # more than arrays could count
        raise DataError(
            f"{num_partitions} clients of at least min_characters {min_characters} cannot be had "
            f"from the {len(corpus.text)} characters of {corpus.name}"
        )
    sides = corpus.split_spans(validation_fraction, by=split)
    request = _Request(corpus, num_partitions, min_characters, seed, **options)
    shares = _DIVIDE[scheme](request, sides)
    _check_sizes(request, scheme, shares)
    train, val = (side.by_client(num_partitions) for side in shares)
    divided = Partition(
        corpus,
        tokenizer or CharTokenizer.from_text(corpus.text),
        scheme,
        seed,
        {
            **options,
            "split": split,
            "validation_fraction": float(validation_fraction),
            "min_characters": min_characters,
        },
        train,
        val,
    )
    len(divided.ids)  # or a character outside the vocabulary would be found later only
    return divided


def _concentration(alpha: float) -> float:
    if isinstance(alpha, int | float | np.number) and 0 < alpha <= _EVEN:
        return float(alpha)
    raise DataError(f"alpha must be a number above 0 and at most {_EVEN:g}, it is {alpha!r}")


_DEFAULTS: dict[Scheme, dict[str, Any]] = {
    "contiguous": {},
    "iid": {"window": WINDOW},
    "quantity-skew": {"alpha": ALPHA, "window": WINDOW},
    "by-play": {},
    "by-speaker": {},
    "dirichlet": {"alpha": ALPHA, "by": "play"},
}


def _options(scheme: Scheme, given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(_DEFAULTS[scheme])
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            users = [scheme for scheme in SCHEMES if name in _DEFAULTS[scheme]]
            raise DataError(f"{name} belongs to {' and '.join(users)}, not to {scheme}")
        options[name] = value
    if "alpha" in options:
        options["alpha"] = _concentration(options["alpha"])
    if "window" in options:
        options["window"] = whole_number("window", options["window"], 1)
    if (by := options.get("by", "play")) not in get_args(GroupBy):
        raise DataError(f"by must be 'play' or 'speaker', it is {by!r}")
    return options


@dataclass(frozen=True)
class _Request:
    corpus: Corpus
    clients: int
    min_characters: int
    seed: int
    alpha: float = ALPHA
    by: GroupBy = "play"
    window: int = WINDOW

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


Sides = tuple[Spans, ...]  # training and validation


@dataclass(frozen=True)
class _Shares:
    """Stretches of one side of the text and whose each is."""

    spans: Spans  # (k, 2), disjoint
    owners: NDArray[np.int64]  # (k,), from 0

    def sizes(self, clients: int) -> NDArray[np.int64]:
        """Characters by client: int64 `(clients,)`."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return np.bincount(self.owners, lengths, clients).astype(np.int64)

    def within(self, sides: Sides) -> "list[_Shares]":
        """What of them lies in each side, whose stretches are in order."""
        return [self._within(side) for side in sides]

    def _within(self, side: Spans) -> "_Shares":
        first = np.searchsorted(side[:, 1], self.spans[:, 0], side="right")
        counts = np.searchsorted(side[:, 0], self.spans[:, 1], side="left") - first
        whole = np.repeat(np.arange(len(self.spans)), counts)
        of_side = np.arange(len(whole)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        start = np.maximum(self.spans[whole, 0], side[of_side, 0])
        stop = np.minimum(self.spans[whole, 1], side[of_side, 1])
        return _Shares(np.stack([start, stop], axis=1), self.owners[whole])

    def by_client(self, clients: int) -> tuple[Spans, ...]:
        order = np.argsort(self.owners, kind="stable")
        stops = np.cumsum(np.bincount(self.owners, minlength=clients))
        return tuple(read_only(merged(s)) for s in np.split(self.spans[order], stops[:-1]))


def _contiguous(request: _Request, sides: Sides) -> list[_Shares]:
    return [_dealt(side, _equal_stops(side, request.clients)) for side in sides]


def _iid(request: _Request, sides: Sides) -> list[_Shares]:
    rng = request.rng()
    return _contiguous(request, tuple(_shuffled(side, request.window, rng) for side in sides))


def _quantity_skew(request: _Request, sides: Sides) -> list[_Shares]:
    rng = request.rng()
    proportions = rng.dirichlet(np.full(request.clients, request.alpha))
    shares = []
    for side in sides:
        spare = max(0, _size(side) - request.clients * request.min_characters)
        extra = np.round(np.cumsum(proportions) * spare).astype(np.int64)
        stops = extra + request.min_characters * np.arange(1, request.clients + 1)
        shares.append(_dealt(_shuffled(side, request.window, rng), stops))
    return shares


def _by_play(request: _Request, sides: Sides) -> list[_Shares]:
    plays = _groups(request.corpus, "play")
    sizes = np.array([_size(play) for play in plays])
    if request.clients <= len(plays):
        first, counts = _balanced(sizes, request.clients), np.ones(len(plays), dtype=np.int64)
    else:
        counts = _clients_of_each(sizes, request.clients)
        first = np.cumsum(counts) - counts
    renamed = request.rng().permutation(request.clients)  # or the first had the first plays always
    owners = [
        renamed[begin + _cut(play, np.full(count, 1 / count))]
        for play, begin, count in zip(plays, first, counts, strict=True)
    ]
    return _Shares(np.concatenate(plays), np.concatenate(owners)).within(sides)


def _by_speaker(request: _Request, sides: Sides) -> list[_Shares]:
    roles = _roles(request.corpus)
    everyone = _Shares(
        np.concatenate(roles), np.repeat(np.arange(len(roles)), [len(role) for role in roles])
    )
    smaller_side = np.minimum(*(side.sizes(len(roles)) for side in everyone.within(sides)))
    enough = np.flatnonzero(smaller_side >= request.min_characters)
    if len(enough) < request.clients:
        raise DataError(
            f"by-speaker needs a role for each of {request.clients} clients; of the {len(roles)} "
            f"roles of {request.corpus.name}, {len(enough)} have at least min_characters "
            f"{request.min_characters} to train and to validate"
        )
    chosen = [roles[i] for i in request.rng().permutation(enough)[: request.clients]]
    owners = np.repeat(np.arange(request.clients), [len(role) for role in chosen])
    return _Shares(np.concatenate(chosen), owners).within(sides)


def _dirichlet(request: _Request, sides: Sides) -> list[_Shares]:
    rng = request.rng()
    groups = _groups(request.corpus, "play") if request.by == "play" else _roles(request.corpus)
    best: list[_Shares] = []
    most = -1
    for _ in range(_DRAWS):
        proportions = rng.dirichlet(np.full(request.clients, request.alpha), size=len(groups))
        owners = [_cut(*pair) for pair in zip(groups, proportions, strict=True)]
        shares = _Shares(np.concatenate(groups), np.concatenate(owners)).within(sides)
        smallest = min(int(side.sizes(request.clients).min()) for side in shares)
        if smallest > most:
            best, most = shares, smallest
        if smallest >= request.min_characters:
            break
    return best


_DIVIDE: dict[Scheme, Callable[[_Request, Sides], list[_Shares]]] = {
    "contiguous": _contiguous,
    "iid": _iid,
    "quantity-skew": _quantity_skew,
    "by-play": _by_play,
    "by-speaker": _by_speaker,
    "dirichlet": _dirichlet,
}


def _check_sizes(request: _Request, scheme: Scheme, shares: Sequence[_Shares]) -> None:
    sizes = {
        side: share.sizes(request.clients)
        for side, share in zip(("train", "val"), shares, strict=True)
    }
    for side, of_clients in sizes.items():
        client = int(of_clients.argmin())
        if of_clients[client] >= request.min_characters:
            continue
        smallest = np.argsort(of_clients, kind="stable")[:_NAMED_SIZES].tolist()
        named = ", ".join(f"client {i}: {sizes['train'][i]}/{sizes['val'][i]}" for i in smallest)
        raise DataError(
            f"{scheme} would give client {client} of {request.clients} {of_clients[client]} {side} "
            f"characters, min_characters asks for {request.min_characters}; "
            f"{_advice(request, scheme, sizes)}train/val characters are, "
            f"from the smallest on, {named}"
        )


def _advice(request: _Request, scheme: Scheme, sizes: Mapping[str, NDArray[np.int64]]) -> str:
    total = min(int(of_clients.sum()) for of_clients in sizes.values())
    most = total // request.min_characters
    if most < request.clients:
        return f"the text allows {f'at most {most} clients' if most else 'none'} of so many; "
    if scheme == "dirichlet":
        return f"this is the best of {_DRAWS} draws, a larger alpha makes shares more equal; "
    return ""


def _groups(corpus: Corpus, by: GroupBy) -> list[Spans]:
    """The speeches of each play or role, as they come; those without a speaker are of no role."""
    groups: dict[Any, list[int]] = {}
    for i, speech in enumerate(corpus.speeches):
        if by == "play" or speech.speaker:
            groups.setdefault(speech.play if by == "play" else speech.role, []).append(i)
    spans = np.stack([corpus.speech_starts[:-1], corpus.speech_starts[1:]], axis=1)
    return [spans[chosen] for chosen in groups.values()]


def _roles(corpus: Corpus) -> list[Spans]:
    roles = _groups(corpus, "speaker")
    if not roles:
        raise DataError(
            f"{corpus.name} has no speakers: its paragraphs do not begin with a line 'NAME:'"
        )
    return roles


def _size(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _take(ids: NDArray[np.uint16], spans: Spans) -> NDArray[np.uint16]:
    """The ids of `spans`: a view if they are one stretch."""
    if len(spans) == 1:
        return ids[spans[0, 0] : spans[0, 1]]
    return read_only(np.concatenate([ids[start:stop] for start, stop in spans.tolist()]))


def _cut(spans: Spans, proportions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whose each of `spans` (k,) is, when shares of these proportions follow one another."""
    lengths = spans[:, 1] - spans[:, 0]
    middles = np.cumsum(lengths) - lengths / 2
    return np.searchsorted(np.cumsum(proportions)[:-1] * lengths.sum(), middles)


def _dealt(stream: Spans, stops: NDArray[np.int64]) -> _Shares:
    """Cut `stream`, whose spans follow one another in any order, at these counts of characters."""
    lengths = stream[:, 1] - stream[:, 0]
    ends = np.cumsum(lengths)
    bounds = np.unique(np.concatenate([[0], ends, stops[stops < ends[-1]]]))
    begin, end = bounds[:-1], bounds[1:]
    span = np.searchsorted(ends, begin, side="right")
    start = stream[span, 0] + begin - (ends - lengths)[span]
    owners = np.searchsorted(stops, begin, side="right").clip(max=len(stops) - 1)
    return _Shares(np.stack([start, start + end - begin], axis=1), owners)


def _equal_stops(side: Spans, clients: int) -> NDArray[np.int64]:
    size, rest = divmod(_size(side), clients)
    return np.cumsum(size + (np.arange(clients) < rest))


def _shuffled(side: Spans, window: int, rng: np.random.Generator) -> Spans:
    window = min(window, _size(side))
    starts = [np.arange(start, stop, window) for start, stop in side]
    windows = np.concatenate(
        [
            np.stack([begin, np.minimum(begin + window, stop)], axis=1)
            for begin, (_, stop) in zip(starts, side, strict=True)
        ]
    )
    return rng.permutation(windows)


def _balanced(sizes: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """Whose each group is: the largest goes to whom has least, then the next."""
    owners = np.zeros(len(sizes), dtype=np.int64)
    loads = np.zeros(clients, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        owners[group] = loads.argmin()
        loads[owners[group]] += sizes[group]
    return owners


def _clients_of_each(sizes: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """How many clients each group is for: one, then one more where a client's share is largest."""
    counts = np.ones(len(sizes), dtype=np.int64)
    for _ in range(clients - len(sizes)):
        counts[np.argmax(sizes / counts)] += 1
    return counts


def jensen_shannon(counts: NDArray[np.int64], whole: NDArray[np.int64]) -> float:
    """Divergence in bits of two distributions given as counts `(V,)` (Lin, 1991)."""
    p, q = counts / counts.sum(), whole / whole.sum()
    mean = (p + q) / 2

    def relative_entropy(distribution: NDArray[np.float64]) -> float:
        occurs = distribution > 0
        ratio = distribution[occurs] / mean[occurs]
        return float(np.sum(distribution[occurs] * np.log2(ratio)))

    return (relative_entropy(p) + relative_entropy(q)) / 2
