from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shakespeare_data import SCHEMES, CharTokenizer, Corpus, DataError, Partition, partition

MakeCorpus = Callable[..., Corpus]
BY_SPEECHES = ("by-play", "by-speaker", "dirichlet")


def owned(divided: Partition) -> list[list[int]]:
    """Return the positions in the text of each client, training before validation."""
    return [
        [
            place
            for start, stop in np.concatenate([train, val]).tolist()
            for place in range(start, stop)
        ]
        for train, val in zip(divided.train, divided.val, strict=True)
    ]


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Draw arguments of `partition` that `folio` is large enough for."""
    scheme = draw(st.sampled_from(SCHEMES))
    request = {
        "scheme": scheme,
        "num_partitions": draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 2**32)),
        "validation_fraction": draw(st.sampled_from([0.1, 0.2, 0.4])),
    }
    if scheme in ("dirichlet", "quantity-skew"):
        request["alpha"] = draw(st.floats(0.3, 100))
    if scheme == "dirichlet":
        request["by"] = draw(st.sampled_from(["play", "speaker"]))
    if scheme in ("iid", "quantity-skew"):
        request["window"] = draw(st.integers(1, 400))
    return request


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_=requests())
def test_parts_are_disjoint_and_complete_and_repeat_with_the_seed(
    folio: Corpus, request_: dict[str, Any]
) -> None:
    divided = partition(folio, **request_)
    places = owned(divided)
    everywhere = [place for of_client in places for place in of_client]
    assert len(everywhere) == len(set(everywhere))
    assert len(everywhere) + divided.left_out == len(folio.text)
    if request_["scheme"] != "by-speaker":
        assert divided.left_out == 0
    assert len(divided) == len(places) == request_["num_partitions"]
    assert owned(partition(folio, **request_)) == places
    for part, of_client in zip(divided, places, strict=True):
        together = np.concatenate([part.train, part.val])
        expected = "".join(folio.text[place] for place in of_client)
        assert divided.tokenizer.decode(together) == expected
        assert min(len(part.train), len(part.val)) >= 2


@given(
    scheme=st.sampled_from(SCHEMES),
    num_partitions=st.integers(1, 6),
    split=st.sampled_from(["end", "speech"]),
)
def test_all_clients_together_have_the_two_sides_of_the_split(
    folio: Corpus, scheme: Any, num_partitions: int, split: Any
) -> None:
    if scheme in BY_SPEECHES and split == "end":
        return  # some clients would have nothing to validate on
    divided = partition(folio, num_partitions, scheme, 3, split=split)
    allowed = folio.split_spans(by=split)
    for parts, side in zip((divided.train, divided.val), allowed, strict=True):
        places = {p for spans in parts for start, stop in spans for p in range(start, stop)}
        of_side = {p for start, stop in side for p in range(start, stop)}
        assert places <= of_side
        if scheme != "by-speaker":
            assert places == of_side


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "contiguous"])
def test_another_seed_gives_other_parts(folio: Corpus, scheme: Any) -> None:
    found = {str(owned(partition(folio, 3, scheme, seed))) for seed in range(4)}
    assert len(found) > 1


@given(num_partitions=st.integers(1, 40))
def test_contiguous_parts_are_those_of_array_split(verses: Corpus, num_partitions: int) -> None:
    divided = partition(verses, num_partitions)
    for text, side in zip(verses.split(), ("train", "val"), strict=True):
        expected = np.array_split(divided.tokenizer.encode(text), num_partitions)
        for part, tokens in zip(divided, expected, strict=True):
            np.testing.assert_array_equal(getattr(part, side), tokens)


def test_contiguous_parts_are_views_of_one_array(verses: Corpus) -> None:
    one, other = partition(verses, 2)
    assert one.train.base is other.train.base is not None


@given(num_partitions=st.integers(1, 9), window=st.integers(1, 500), seed=st.integers(0, 99))
def test_iid_parts_have_equal_sizes_and_consist_of_windows(
    verses: Corpus, num_partitions: int, window: int, seed: int
) -> None:
    divided = partition(verses, num_partitions, "iid", seed, window=window)
    sizes = [len(part.train) for part in divided]
    assert max(sizes) - min(sizes) <= 1
    # A span ends at the end of a window, or where the next client begins.
    inner = {int(stop) % window for spans in divided.train for stop in spans[:-1, 1]}
    assert len(inner - {0}) <= 2 * num_partitions + 1


def test_quantity_skew_gives_the_dirichlet_shares_over_the_minimum(verses: Corpus) -> None:
    divided = partition(verses, 5, "quantity-skew", 7, alpha=0.4, min_characters=50)
    shares = np.random.default_rng(7).dirichlet(np.full(5, 0.4))
    spare = len(verses.split()[0]) - 5 * 50
    for part, share in zip(divided, shares, strict=True):
        assert len(part.train) == pytest.approx(50 + share * spare, abs=1)
        assert len(part.val) >= 50


def test_by_play_gives_whole_plays_balanced(folio: Corpus) -> None:
    divided = partition(folio, 2, "by-play")
    titles = [
        {speech.play for speech in folio.speeches if speech.text[:-2] in text}
        for text in texts(folio, divided)
    ]
    assert sorted(map(len, titles)) == [1, 2]  # one client has the longest play
    assert {"Long"} in titles


def test_by_play_cuts_a_play_between_speeches_when_clients_outnumber_plays(folio: Corpus) -> None:
    divided = partition(folio, 12, "by-play")
    boundaries = set(folio.speech_starts.tolist())
    assert {place for spans in divided.train for pair in spans.tolist() for place in pair} <= (
        boundaries
    )
    assert all(part.plays == 1 for part in divided.report())
    assert {part.titles for part in divided.report()} == {(play.title,) for play in folio.plays}
    assert max(len(part.train) for part in divided) < 2 * min(len(part.train) for part in divided)


def test_by_speaker_gives_each_client_one_role_with_enough(folio: Corpus) -> None:
    roles = {
        role: "".join(speech.text for speech in folio.speeches if speech.role == role)
        for role in dict.fromkeys(speech.role for speech in folio.speeches)
    }
    assert len(roles) == 7
    divided = partition(folio, 3, "by-speaker", 1, min_characters=60)
    for part in divided:
        both = len(part.train) + len(part.val)
        assert sum(len(text) == both for text in roles.values()) >= 1
    assert [report.speakers for report in divided.report()] == [1, 1, 1]
    for report, text in zip(divided.report(), texts(folio, divided), strict=True):
        assert text.startswith(f"{report.roles[0]}:")
    assert divided.left_out == len(folio.text) - sum(r.train + r.val for r in divided.report())


def texts(corpus: Corpus, divided: Partition) -> list[str]:
    return [
        corpus.text_of(train) + corpus.text_of(val)
        for train, val in zip(divided.train, divided.val, strict=True)
    ]


def test_dirichlet_with_large_alpha_is_even_and_with_small_alpha_is_not(folio: Corpus) -> None:
    def spread(alpha: float) -> float:
        reports = [
            partition(folio, 3, "dirichlet", seed, alpha=alpha).report() for seed in range(8)
        ]
        return float(np.mean([np.std([part.train for part in report]) for report in reports]))

    assert spread(1000) < spread(1) < spread(0.2)


def test_dirichlet_by_speaker_divides_each_role(folio: Corpus) -> None:
    even = partition(folio, 2, "dirichlet", 0, alpha=1e6, by="speaker")
    for part in even.report():
        assert part.speakers == 7
        assert part.train + part.val == pytest.approx(len(folio.text) / 2, rel=0.05)


def test_a_text_without_speakers_has_no_roles_to_divide_by(make_corpus: MakeCorpus) -> None:
    prose = make_corpus("It was so.\n\nIt was not so.\n\n" * 50)
    for request in ({"scheme": "by-speaker"}, {"scheme": "dirichlet", "by": "speaker"}):
        with pytest.raises(DataError, match="has no speakers"):
            partition(prose, 2, **request)
    assert len(partition(prose, 2, "dirichlet")) == 2


def test_the_divergence_is_that_of_the_definition(folio: Corpus) -> None:
    divided = partition(folio, 3, "by-play")

    def entropy(distribution: dict[str, float]) -> float:
        return -sum(p * np.log2(p) for p in distribution.values() if p)

    def distribution(text: str) -> dict[str, float]:
        return {c: text.count(c) / len(text) for c in set(folio.text)}

    whole = distribution(folio.text)
    for part, text in zip(divided.report(), texts(folio, divided), strict=True):
        own = distribution(text)
        mean = {c: (own[c] + whole[c]) / 2 for c in whole}
        expected = entropy(mean) - (entropy(own) + entropy(whole)) / 2
        assert part.divergence == pytest.approx(expected)
        assert 0 < part.divergence < 1


def test_the_whole_does_not_diverge_from_itself(folio: Corpus) -> None:
    (report,) = partition(folio, 1).report()
    assert report.divergence == 0
    assert (report.speakers, report.plays) == (7, 3)
    assert report.train + report.val == len(folio.text)


def test_a_part_in_memory_describes_itself(verses: Corpus) -> None:
    part = partition(verses, 2, "iid", 4)[1]
    assert part.name == "1 of 2"
    assert part.train.dtype == part.val.dtype == np.uint16
    assert part.meta["corpus_sha256"] == verses.sha256
    assert part.meta["scheme"] == "iid"
    assert part.meta["seed"] == 4
    assert part.meta["options"]["window"] == 1024


def test_numbers_of_numpy_are_numbers(folio: Corpus, tmp_path: Path) -> None:
    one = partition(folio, np.int64(2), "dirichlet", np.uint32(3), alpha=np.float32(0.5))
    other = partition(folio, 2, "dirichlet", 3, alpha=0.5)
    one.write(tmp_path / "out")
    assert owned(one) == owned(other)


@pytest.mark.parametrize("client", [-1, 2])
def test_a_client_that_does_not_exist_is_refused(verses: Corpus, client: int) -> None:
    with pytest.raises(DataError, match=f"from 0 to 1, it is {client}"):
        partition(verses, 2)[client]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_partitions": 0}, "num_partitions must be a whole number of at least 1, it is 0"),
        ({"num_partitions": -1}, "num_partitions must be a whole number of at least 1, it is -1"),
        ({"num_partitions": 2.0}, "num_partitions must be a whole number .* it is 2.0"),
        ({"seed": None}, "seed must be a whole number of at least 0, it is None"),
        ({"scheme": "iid", "window": "wide"}, "window must be a whole number .* it is 'wide'"),
        ({"scheme": "dirichlet", "alpha": "much"}, "alpha must be a number .* it is 'much'"),
        ({"scheme": "random"}, "scheme must be one of contiguous, iid, .*; it is 'random'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, it is -1"),
        ({"min_characters": 0}, "min_characters must be a whole number of at least 1, it is 0"),
        ({"split": "half"}, "split must be one of end, play, speech; it is 'half'"),
        ({"validation_fraction": 1}, "validation_fraction must be between 0 and 1, it is 1"),
        ({"alpha": 1.0}, "alpha belongs to dirichlet and quantity-skew, not to contiguous"),
        ({"window": 9}, "window belongs to iid and quantity-skew, not to contiguous"),
        ({"by": "play"}, "by belongs to dirichlet, not to contiguous"),
        (
            {"scheme": "dirichlet", "alpha": 0.0},
            "alpha must be a number above 0 and at most 1e\\+09, it is 0.0",
        ),
        (
            {"scheme": "dirichlet", "alpha": float("nan")},
            "alpha must be a number above 0 .* it is nan",
        ),
        (
            {"scheme": "dirichlet", "alpha": float("inf")},
            "alpha must be a number above 0 .* it is inf",
        ),
        ({"scheme": "dirichlet", "by": "act"}, "by must be 'play' or 'speaker', it is 'act'"),
        ({"scheme": "iid", "window": 0}, "window must be a whole number of at least 1, it is 0"),
    ],
)
def test_arguments_out_of_range_are_named(
    verses: Corpus, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        partition(verses, **{"num_partitions": 2} | request_)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_clients_than_the_text_can_feed_are_refused_with_sizes(
    folio: Corpus, scheme: Any
) -> None:
    with pytest.raises(DataError) as raised:
        partition(folio, 40, scheme, min_characters=100)
    message = str(raised.value)
    if scheme == "by-speaker":
        assert "of the 7 roles of folio, 2 have at least min_characters 100" in message
    else:
        assert "min_characters is 100" in message
        assert "of 40" in message
        assert "train/val characters of the smallest clients: client " in message


def test_the_error_says_how_many_clients_the_text_allows(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("ab" * 500)  # 900 characters of training text, 100 of validation
    message = (
        "contiguous would give client 0 of 4 only 25 val characters, but min_characters is 33; "
        "the text allows at most 3 clients; train/val characters of the smallest clients: "
        "client 0: 225/25, client 1: 225/25, client 2: 225/25, client 3: 225/25"
    )
    with pytest.raises(DataError, match=message):
        partition(corpus, 4, min_characters=33)
    assert len(partition(corpus, 3, min_characters=33)) == 3
    with pytest.raises(DataError, match="the text allows no client"):
        partition(corpus, 4, min_characters=200)


def test_more_characters_than_the_text_has_are_refused(folio: Corpus) -> None:
    for request in ({"num_partitions": 10**12}, {"num_partitions": 2, "min_characters": 2**62}):
        with pytest.raises(DataError, match="the 4730 characters of folio are too few for"):
            partition(folio, scheme="quantity-skew", **request)


def test_a_text_outside_the_vocabulary_is_refused_at_once(make_corpus: MakeCorpus) -> None:
    with pytest.raises(DataError, match="not in the vocabulary"):
        partition(make_corpus("abc" * 100), 2, tokenizer=CharTokenizer("ab"))


def test_shared_arrays_cannot_be_changed(folio: Corpus) -> None:
    for scheme in SCHEMES:
        divided = partition(folio, 2, scheme)
        for shared in (divided[0].train, divided[0].val, divided.train[0], folio.speech_starts):
            with pytest.raises(ValueError, match="read-only"):
                shared[0] = 0


def test_one_play_cannot_be_split_by_play(verses: Corpus, folio: Corpus) -> None:
    with pytest.raises(DataError, match="verses is one play; a split by play needs two"):
        partition(verses, 2, split="play")
    renamed = replace(folio, titles=folio.titles[:2])
    assert renamed.split(by="play")[1] == folio.text[folio.titles[1][0] :]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pooled_is_the_text_of_all_clients_in_the_order_of_the_text(
    folio: Corpus, scheme: Any
) -> None:
    divided = partition(folio, 3, scheme, seed=1, window=20 if scheme == "iid" else None)
    pooled = divided.pooled()
    for side in ("train", "val"):
        held = sorted(
            (start, stop) for spans in getattr(divided, side) for start, stop in spans.tolist()
        )
        text = "".join(folio.text[start:stop] for start, stop in held)
        assert divided.tokenizer.decode(getattr(pooled, side)) == text
    assert pooled.name == "pooled"
