"""A client's own secret."""

import hashlib
import hmac
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flower_adapter import Refusal, derive, own_secret
from flower_adapter.client.secret import SECRET_FILE


def client() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


def test_the_secret_on_disk_survives_and_belongs_to_its_owner(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    first = own_secret(client(), directory)
    assert len(first) == 32
    assert own_secret(client(), directory) == first
    assert own_secret(client(), tmp_path / "other") != first
    assert (directory / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in directory.iterdir()] == [SECRET_FILE]


def test_without_a_directory_the_secret_lives_as_long_as_the_context() -> None:
    here = client()
    assert own_secret(here, None) == own_secret(here, None)
    assert own_secret(here, None) != own_secret(client(), None)


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(Refusal, match="state: the secret of this client is damaged"):
        own_secret(client(), tmp_path)


def test_what_is_derived_is_an_hmac_of_parts_with_their_lengths() -> None:
    text = bytes(7) + b"\x05" + b"label" + bytes(7) + b"\x02" + "é".encode()
    expected = hmac.new(b"key", text, hashlib.sha256).digest()
    assert derive(b"key", "label", "é") == expected


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_other_parts_give_other_bytes(one: list[str], other: list[str]) -> None:
    assert (derive(b"k", *one) == derive(b"k", *other)) == (one == other)
