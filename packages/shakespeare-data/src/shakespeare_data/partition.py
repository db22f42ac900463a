"""Divide a text among clients with a scheme that is common in federated learning.

A span is a contiguous piece of the text. A scheme gives each client some spans for training and
other spans for validation. No character belongs to two clients. `Partition.left_out` is the number
of characters that belong to no client.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shakespeare_data.corpus import Corpus, Spans, SplitBy, merged, read_only
from shakespeare_data.errors import DataError, whole_number
from shakespeare_data.parts import Origin, Part, make_part, write_federation
from shakespeare_data.tokenizer import CharTokenizer

Scheme = Literal["contiguous", "iid", "by-play", "by-speaker", "dirichlet", "quantity-skew"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GroupBy = Literal["play", "speaker"]

WINDOW = 1024  # the default number of characters in a window
ALPHA = 0.5  # the default concentration of a Dirichlet distribution
_MAX_ALPHA = 1e9  # with this value, all shares are nearly equal
_DRAWS = 100  # the largest number of Dirichlet draws; after them, the best draw is used
_NAMED_SIZES = 8  # an error message lists at most this many clients, smallest first


@dataclass(frozen=True)
class PartReport:
    """The size and the contents of the part that belongs to one client.

    `divergence` compares the distribution of characters in this part with the distribution of
    characters in the whole text. It is a Jensen-Shannon divergence, so it is between 0 and 1 bit.
    """

    client: int
    train: int  # characters
    val: int  # characters
    speakers: int  # roles with at least one character in this part
    plays: int  # plays with at least one character in this part
    divergence: float
    titles: tuple[str, ...]  # of these plays, the one with the most text first
    roles: tuple[str, ...]  # the names of at most three roles, the one with the most text first


@dataclass(frozen=True, eq=False)
class Partition:
    """A text that is divided among clients, as the function `partition` returns it.

    If `p` is a partition, `p[i]` is the part that belongs to client number `i`. A loop over `p`
    yields the parts of all clients.
    """

    corpus: Corpus = field(repr=False)
    tokenizer: CharTokenizer = field(repr=False)
    scheme: Scheme
    seed: int
    options: Mapping[str, Any]  # the options of the scheme and of the split
    train: tuple[Spans, ...] = field(repr=False)  # the training spans of each client
    val: tuple[Spans, ...] = field(repr=False)  # the validation spans of each client

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.train)

    def __getitem__(self, client: int) -> Part:
        """Return the part that belongs to client number `client`.

        Numbers start at 0. Raises `DataError` if there is no such client.
        """
        if not 0 <= client < len(self):
            raise DataError(f"partition_id must be from 0 to {len(self) - 1}, it is {client}")
        train, val = (_take(self.ids, side[client]) for side in (self.train, self.val))
        return make_part(train, val, self.tokenizer, self._origin(), int(client))

    def __iter__(self) -> Iterator[Part]:
        return (self[client] for client in range(len(self)))

    def pooled(self) -> Part:
        """Return the texts of all clients as one part, in the order of the whole text.

        This is the text of a single party that has everything. Its name is "pooled".
        """
        train, val = (
            _take(self.ids, merged(np.concatenate(side))) for side in (self.train, self.val)
        )
        return replace(make_part(train, val, self.tokenizer, self._origin(), 0), name="pooled")

    @property
    def left_out(self) -> int:
        """The number of characters that belong to no client."""
        return len(self.corpus.text) - sum(map(_size, (*self.train, *self.val)))

    def report(self) -> list[PartReport]:
        """Return one `PartReport` for each client, in the order of the client numbers."""
        whole = self._characters(np.array([[0, len(self.corpus.text)]]))
        return [self._describe(client, whole) for client in range(len(self))]

    def write(self, output: str | Path) -> list[Path]:
        """Write all parts and the report to the directory `output`.

        The module `shakespeare_data.parts` describes the files. The method writes either all files
        or no file. An earlier federation in `output` is replaced as a whole. Returns a list with
        the directory of each part. Raises `DataError` if `output` contains other files or cannot be
        written.
        """
        report = {"left_out": self.left_out, "parts": [asdict(part) for part in self.report()]}
        return write_federation(self, self._origin(), report, output)

    def _origin(self) -> Origin:
        return Origin(
            scheme=self.scheme,
            seed=self.seed,
            options=self.options,
            num_partitions=len(self),
            corpus=self.corpus.name,
            corpus_sha256=self.corpus.sha256,
            source=self.corpus.source,
            licence=self.corpus.licence,
            note=self.corpus.note,
        )

    @cached_property
    def ids(self) -> NDArray[np.uint16]:
        """The token ids of the whole text, as a read-only uint16 array `(characters,)`.

        If a client has one training span, the array `train` of its part is a view of this array.
        Otherwise, `train` is a copy. The same applies to `val`.
        """
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
        plays: Counter[str] = Counter()
        roles: Counter[tuple[str, str]] = Counter()
        for speech in speeches:
            plays[speech.play] += len(speech.text)
            if speech.speaker:
                roles[speech.role] += len(speech.text)
        return PartReport(
            client,
            _size(self.train[client]),
            _size(self.val[client]),
            len(roles),
            len(plays),
            jensen_shannon(self._characters(spans), whole),
            tuple(title for title, _ in plays.most_common() if title),
            tuple(name for (_, name), _ in roles.most_common(3)),
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
    """Divide `corpus` among `num_partitions` clients. The same arguments give the same parts.

    The text is first split into a training side and a validation side (see `Corpus.split_spans`).
    Then each side is divided among the clients. So no client trains on text that another client
    uses for validation.

    - `"contiguous"`: each side is cut into `num_partitions` pieces of equal length, in the order of
      the text. Each client gets one piece of each side, as in Flower's example.
    - `"iid"`: the text is cut into windows of `window` characters (default 1,024). The windows are
      shuffled. Then each client gets an equal amount of text from the shuffled windows.
    - `"quantity-skew"`: the windows are made as for `"iid"`, but the clients get unequal amounts of
      text. Each client first gets `min_characters` characters. The rest of the text is divided in
      random proportions. The proportions are drawn from a symmetric Dirichlet distribution with
      concentration `alpha` (default 0.5).
    - `"by-play"`: each client gets whole plays. The plays are assigned to the clients such that the
      amounts of text are balanced. If there are more clients than plays, several clients share a
      play. Such a play is cut only between two speeches.
    - `"by-speaker"`: each client gets one role, as in LEAF's Shakespeare task (arXiv 1812.01097).
      The roles are drawn at random from all roles that have enough characters. The text of all
      other roles is left out.
    - `"dirichlet"`: each play is divided among all clients in random proportions. If
      `by="speaker"`, each role is divided instead. The proportions are drawn from a symmetric
      Dirichlet distribution with concentration `alpha` (default 0.5), as in arXiv 1909.06335. Each
      cut is between two speeches.

    `seed` determines all random draws. The scheme `"contiguous"` makes no random draws. With
    `"by-play"`, all seeds give the same parts, and `seed` determines which client gets which part.

    `split` is passed to `Corpus.split_spans` as the argument `by`. The default is `"end"` for
    `"contiguous"`, `"iid"` and `"quantity-skew"`. For the other schemes, the default is `"speech"`.
    Every client gets at least `min_characters` characters for training, and the same minimum
    applies to validation. If `tokenizer` is not given, a tokenizer is made from all characters that
    occur in the text.

    Raises `DataError` if an argument is out of range or does not belong to the chosen scheme. Also
    raises `DataError` if the text is too small for all clients.
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
    if max(num_partitions, min_characters) > len(corpus.text):  # avoids arrays that are too large
        raise DataError(
            f"the {len(corpus.text)} characters of {corpus.name} are too few for {num_partitions} "
            f"clients with at least min_characters {min_characters}"
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
    _ = divided.ids  # encode now, so that a character outside the vocabulary raises an error here
    return divided


def _concentration(alpha: float) -> float:
    """Return `alpha` as a float. Raises `DataError` if `alpha` is out of range."""
    if isinstance(alpha, int | float | np.number) and 0 < alpha <= _MAX_ALPHA:
        return float(alpha)
    raise DataError(f"alpha must be a number above 0 and at most {_MAX_ALPHA:g}, it is {alpha!r}")


_DEFAULTS: dict[Scheme, dict[str, Any]] = {
    "contiguous": {},
    "iid": {"window": WINDOW},
    "quantity-skew": {"alpha": ALPHA, "window": WINDOW},
    "by-play": {},
    "by-speaker": {},
    "dirichlet": {"alpha": ALPHA, "by": "play"},
}


def _options(scheme: Scheme, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options in `given`, and return all options of `scheme`.

    If an option is `None`, the result has the default value of `scheme` for this option.
    """
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
    """The checked arguments of `partition` that the schemes need."""

    corpus: Corpus
    clients: int
    min_characters: int
    seed: int
    alpha: float = ALPHA
    by: GroupBy = "play"
    window: int = WINDOW

    def rng(self) -> np.random.Generator:
        """Return a new random generator that starts from `seed`."""
        return np.random.default_rng(self.seed)


Sides = tuple[Spans, ...]  # the spans of the training side, then those of the validation side


@dataclass(frozen=True)
class _Shares:
    """Several spans of a text, and the client that owns each span."""

    spans: Spans  # (k, 2), disjoint, in any order
    owners: NDArray[np.int64]  # (k,), the number of the client for each span

    def sizes(self, clients: int) -> NDArray[np.int64]:
        """Return the number of characters that each client owns, as int64 `(clients,)`."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return np.bincount(self.owners, lengths, clients).astype(np.int64)

    def within(self, sides: Sides) -> "list[_Shares]":
        """Return the shares on the training side, and then the shares on the validation side.

        A span that lies on both sides is cut. Each piece keeps the owner of the span.
        """
        return [self._within(side) for side in sides]

    def _within(self, side: Spans) -> "_Shares":
        # The spans in `side` are sorted. The span `self.spans[i]` overlaps `counts[i]` spans in
        # `side`, beginning with `side[first[i]]`.
        first = np.searchsorted(side[:, 1], self.spans[:, 0], side="right")
        counts = np.searchsorted(side[:, 0], self.spans[:, 1], side="left") - first
        whole = np.repeat(np.arange(len(self.spans)), counts)
        of_side = np.arange(len(whole)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        start = np.maximum(self.spans[whole, 0], side[of_side, 0])
        stop = np.minimum(self.spans[whole, 1], side[of_side, 1])
        return _Shares(np.stack([start, stop], axis=1), self.owners[whole])

    def by_client(self, clients: int) -> tuple[Spans, ...]:
        """Return the spans of each client, as one read-only array for each client.

        The spans in an array are sorted, and spans that touch each other are joined.
        """
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
    # Without this permutation, client 0 would always get the same play.
    renamed = request.rng().permutation(request.clients)
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
            f"{request.min_characters} for training and for validation"
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
            f"{scheme} would give client {client} of {request.clients} only {of_clients[client]} "
            f"{side} characters, but min_characters is {request.min_characters}; "
            f"{_advice(request, scheme, sizes)}train/val characters of the smallest clients: "
            f"{named}"
        )


def _advice(request: _Request, scheme: Scheme, sizes: Mapping[str, NDArray[np.int64]]) -> str:
    total = min(int(of_clients.sum()) for of_clients in sizes.values())
    most = total // request.min_characters
    if most < request.clients:
        return f"the text allows {f'at most {most} clients' if most else 'no client'}; "
    if scheme == "dirichlet":
        return f"this is the best of {_DRAWS} draws, a larger alpha makes the shares more equal; "
    return ""


def _groups(corpus: Corpus, by: GroupBy) -> list[Spans]:
    """Return one array for each play, or one array for each role if `by` is "speaker".

    The array has one span for each speech. A speech without a speaker belongs to no role.
    """
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
    """Return the number of characters in `spans`."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def _take(ids: NDArray[np.uint16], spans: Spans) -> NDArray[np.uint16]:
    """Return the token ids of the characters in `spans`.

    If there is only one span, the result is a view of `ids`. Otherwise, the result is a copy.
    """
    if len(spans) == 1:
        return ids[spans[0, 0] : spans[0, 1]]
    return read_only(np.concatenate([ids[start:stop] for start, stop in spans.tolist()]))


def _cut(spans: Spans, proportions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Divide `spans` into consecutive shares with approximately the given proportions.

    Returns the number of the share for each span, as int64 `(k,)`. No span is cut. Each span
    belongs to the share that contains the middle of the span.
    """
    lengths = spans[:, 1] - spans[:, 0]
    middles = np.cumsum(lengths) - lengths / 2
    return np.searchsorted(np.cumsum(proportions)[:-1] * lengths.sum(), middles)


def _dealt(stream: Spans, stops: NDArray[np.int64]) -> _Shares:
    """Cut the text in `stream` at the positions `stops`, and give one piece to each client.

    The text in `stream` is the joined text of its spans, in the given order. Client 0 gets the text
    from the start to position `stops[0]`. Client 1 gets the text from there to position `stops[1]`,
    and so on. A piece can consist of several spans.
    """
    lengths = stream[:, 1] - stream[:, 0]
    ends = np.cumsum(lengths)
    bounds = np.unique(np.concatenate([[0], ends, stops[stops < ends[-1]]]))
    begin, end = bounds[:-1], bounds[1:]
    span = np.searchsorted(ends, begin, side="right")
    start = stream[span, 0] + begin - (ends - lengths)[span]
    owners = np.searchsorted(stops, begin, side="right").clip(max=len(stops) - 1)
    return _Shares(np.stack([start, start + end - begin], axis=1), owners)


def _equal_stops(side: Spans, clients: int) -> NDArray[np.int64]:
    """Return the argument `stops` for `_dealt` that gives equal amounts of text to all clients.

    The amounts for two clients differ by at most 1 character.
    """
    size, rest = divmod(_size(side), clients)
    return np.cumsum(size + (np.arange(clients) < rest))


def _shuffled(side: Spans, window: int, rng: np.random.Generator) -> Spans:
    """Cut `side` into windows of `window` characters, and shuffle the windows.

    Each span in `side` is cut separately, so its last window may be shorter than `window`.
    """
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
    """Assign groups of speeches to clients such that the clients get similar amounts of text.

    `sizes` has the number of characters in each group. The groups are assigned one at a time, from
    the largest to the smallest. Each group goes to the client that has the fewest characters so
    far. Returns the client number for each group, as int64 `(groups,)`.
    """
    owners = np.zeros(len(sizes), dtype=np.int64)
    loads = np.zeros(clients, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        owners[group] = loads.argmin()
        loads[owners[group]] += sizes[group]
    return owners


def _clients_of_each(sizes: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """Return the number of clients that share each group of speeches, as int64 `(groups,)`.

    `sizes` has the number of characters in each group. First, each group gets one client. Then the
    remaining clients are added one at a time. Each new client joins the group that has the most
    characters per client.
    """
    counts = np.ones(len(sizes), dtype=np.int64)
    for _ in range(clients - len(sizes)):
        counts[np.argmax(sizes / counts)] += 1
    return counts


def jensen_shannon(counts: NDArray[np.int64], whole: NDArray[np.int64]) -> float:
    """Return the Jensen-Shannon divergence between two distributions, in bits (Lin, 1991).

    Each distribution is given as an array of counts `(V,)`.
    """
    p, q = counts / counts.sum(), whole / whole.sum()
    mean = (p + q) / 2

    def relative_entropy(distribution: NDArray[np.float64]) -> float:
        occurs = distribution > 0
        ratio = distribution[occurs] / mean[occurs]
        return float(np.sum(distribution[occurs] * np.log2(ratio)))

    return (relative_entropy(p) + relative_entropy(q)) / 2
