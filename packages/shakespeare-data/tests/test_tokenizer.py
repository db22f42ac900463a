import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_data import CharTokenizer, DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(texts)
def test_decoding_what_was_encoded_gives_the_text_back(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
def test_ids_equal_those_of_a_dictionary(text: str) -> None:
    chars = sorted(set(text))
    stoi = {character: i for i, character in enumerate(chars)}
    ids = CharTokenizer.from_text(text).encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [stoi[character] for character in text]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x17F), min_size=1),
    length=st.integers(2**12, 2**12 + 3),
)
def test_long_texts_are_encoded_as_short_ones_are(text: str, length: int) -> None:
    long = (text * length)[:length]
    tokenizer = CharTokenizer.from_text(text)
    expected = np.resize(np.concatenate([tokenizer.encode(c) for c in text]), length)
    np.testing.assert_array_equal(tokenizer.encode(long), expected)
    assert tokenizer.decode(expected) == long


@pytest.mark.parametrize("length", [5, 5001])
@pytest.mark.parametrize("unknown", ["é", "€", "\U0001f600"])
def test_unknown_characters_can_be_replaced(length: int, unknown: str) -> None:
    tokenizer = CharTokenizer("abc")
    text = "a" * (length - 2) + unknown + "c"
    with pytest.raises(DataError, match=f"at position {length - 2} is not in the vocabulary"):
        tokenizer.encode(text)
    found = tokenizer.encode(text, replacement="b")
    assert tokenizer.decode(found) == "a" * (length - 2) + "bc"


@given(texts, texts)
def test_a_replacement_stands_for_every_unknown_character(known: str, text: str) -> None:
    tokenizer = CharTokenizer.from_text(known)
    expected = "".join(c if c in known else known[0] for c in text)
    assert tokenizer.decode(tokenizer.encode(text, replacement=known[0])) == expected


@pytest.mark.parametrize("replacement", ["", "ab", "z"])
def test_a_replacement_outside_the_vocabulary_is_refused(replacement: str) -> None:
    with pytest.raises(DataError, match="replacement must be one character of the vocabulary"):
        CharTokenizer("abc").encode("abc", replacement=replacement)


def test_an_unknown_character_far_into_a_text_is_named_with_its_position() -> None:
    for text, place in (("a" * 200_000 + "é", 200_000), ("a" * 100_001 + "€a", 100_001)):
        with pytest.raises(DataError, match=f"at position {place} is not"):
            CharTokenizer("a").encode(text)
    with pytest.raises(DataError, match="U\\+D800, at position 70000"):
        CharTokenizer("a").encode("a" * 70_000 + "\ud800")


@given(texts)
def test_a_tokenizer_survives_json(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert CharTokenizer.from_json(tokenizer.to_json()) == tokenizer


def test_a_saved_tokenizer_is_json_with_a_type_and_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    CharTokenizer.from_text("naïve €").save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == {"type": "char", "vocab": " aenvï€"}
    assert CharTokenizer.load(path) == CharTokenizer(" aenvï€")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_equality_hash_and_fingerprint_depend_on_the_vocabulary_alone() -> None:
    one, same, other = map(CharTokenizer.from_text, ("abcabc", "cab", "abd"))
    assert one == same
    assert hash(one) == hash(same)
    assert one.fingerprint == same.fingerprint == "ba7816bf8f01cfea"  # FIPS 180-2: "abc"
    assert one != other
    assert one.fingerprint != other.fingerprint


def test_an_empty_text_encodes_to_no_ids_and_back() -> None:
    tokenizer = CharTokenizer("ab")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


def test_a_vocabulary_of_all_16_bits_works_and_one_more_character_does_not() -> None:
    full = "".join(map(chr, range(0x10000, 0x20000)))
    tokenizer = CharTokenizer.from_text(full)
    assert tokenizer.encode(full[-1]).tolist() == [65_535]
    with pytest.raises(DataError, match="65,537 distinct characters"):
        CharTokenizer.from_text(full + "a")


def test_an_unknown_character_is_named_with_its_position_and_the_vocabulary() -> None:
    message = r"character 'é' \(U\+00E9\) at position 2 .* 3 characters 'abc'"
    with pytest.raises(DataError, match=message):
        CharTokenizer("abc").encode("abéc")


@pytest.mark.parametrize("character", ["\0", "b", "\U0010ffff"])
def test_characters_below_between_and_above_the_vocabulary_are_unknown(character: str) -> None:
    with pytest.raises(DataError, match="at position 1 is not in the vocabulary"):
        CharTokenizer("ac").encode("a" + character)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 3], "id 3 at position 1 is outside 0 to 2"),
        ([-1], "id -1 at position 0"),
        ([0.5], "array of integers, got float64"),
        ([[0, 1]], r"shape \(1, 2\)"),
    ],
)
def test_ids_out_of_range_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "at least one character"), ("ab\ud800", r"lone surrogate, U\+D800, at position 2")],
)
def test_a_text_that_gives_no_vocabulary_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CharTokenizer.from_text(text)


def test_encoding_a_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        CharTokenizer("ab").encode("a\udfff")


@pytest.mark.parametrize("vocab", ["ba", "aa"])
def test_a_vocabulary_that_is_not_sorted_is_refused(vocab: str) -> None:
    with pytest.raises(DataError, match="sorted and have each character once"):
        CharTokenizer(vocab)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[]", '"type": "char"'),
        (b'{"type": "bpe", "vocab": "ab"}', '"type": "char"'),
        (b'{"type": "char"}', '"vocab" of the tokenizer must be a string'),
        (b'{"type": "char", "vocab": ""}', "at least one character"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        CharTokenizer.load(path)
    assert str(path) in str(raised.value)


def test_a_path_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "tokenizer.json"
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*missing"):
        CharTokenizer.load(path)
    with pytest.raises(DataError, match=r"cannot write the tokenizer .*missing"):
        CharTokenizer("ab").save(path)
