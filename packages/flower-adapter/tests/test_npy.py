import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import example, given
from hypothesis import strategies as st

from flower_adapter.arrays import npy
from flower_adapter.arrays.codecs import CodecError, codec


def with_text(text: str, values: bytes = b"", version: int = 1) -> bytes:
    """Return bytes in numpy's format with this text as the header."""
    width = 2 if version == 1 else 4
    header = text.encode("latin-1", "replace")
    size = len(header).to_bytes(width, "little", signed=False) if len(header) < 2**16 else b"\xff"
    return b"\x93NUMPY" + bytes([version, 0]) + size.ljust(width, b"\0") + header + values


def header(descr: str, shape: str, order: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n"


DESCRS = [
    "<f4", ">f4", "|V0", "|S0", "<U0", "|V9999999999", "<M8[s]", "<M8[0s]", "<M8[99999999999999s]",
    "|O", "<f99", "<i3", "|b1", "<c16", "=f4", "|a5", "<V2147483648", "<U2147483648", "<m8[x]",
]  # fmt: skip
SHAPES = [
    "()", "(0,)", "(2,)", "(2, 2)", "(16000, 16000)", "(0, 9223372036854775807)",
    "(99999999999999999999,)", "(4294967296, 4294967296)", f"({'9' * 5000},)",
    f"({'1, ' * 65}1)", f"(0, {'9' * 4000})", "(-1,)", "(True,)", "[2]",
]  # fmt: skip


@pytest.mark.parametrize("descr", DESCRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 8, 16])
def test_a_hostile_header_gives_a_value_error_or_the_array(
    descr: str, shape: str, count: int
) -> None:
    read(with_text(header(descr, shape), bytes(count)))


@given(data=st.binary(max_size=200))
@example(b"")
@example(b"\x93NUMPY")
@example(b"\x93NUMPY\x01\x00")
@example(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
@example(b"\x93NUMPY\x03\x00\x10\x00")
def test_any_bytes_give_a_value_error_or_the_array(data: bytes) -> None:
    read(data)


@given(data=st.data())
def test_any_change_of_a_header_gives_a_value_error_or_the_array(data: st.DataObject) -> None:
    whole = bytearray(npy.to_array(np.ones((2, 3), np.float32)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        new = data.draw(st.binary(max_size=3))
        whole[place : place + data.draw(st.integers(0, 3))] = new
        whole = whole or bytearray(b"x")
    read(bytes(whole))


@given(text=st.text(st.characters(max_codepoint=255), max_size=100), version=st.integers(0, 4))
def test_any_text_as_a_header_gives_a_value_error_or_the_array(text: str, version: int) -> None:
    read(with_text(text, version=version))


def read(data: bytes, **declared: Any) -> None:
    """Read the bytes. Declare what the array holds, so that only its bytes can be wrong."""
    for dtype, shape in (("float32", (2, 3)), ("float32", (16000, 16000)), ("void", (2,))):
        try:
            values = npy.from_array(Array(dtype, shape, npy.STYPE, data))
        except ValueError:
            continue
        assert (str(values.dtype), values.shape) == (dtype, shape)
        assert values.nbytes <= len(data)


def test_values_without_bytes_are_refused() -> None:
    data = with_text(header("|V0", "(16000, 16000)"))
    with pytest.raises(ValueError, match="whose values take no bytes"):
        npy.from_array(Array("|V0", (16000, 16000), npy.STYPE, data))


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "2-bit", "top-k", "top-k:1e-6"])
@given(
    data=st.binary(max_size=132),
    shape=st.lists(st.integers(1, 2**40), min_size=2, max_size=4),
)
@example(data=bytes(132), shape=[16000, 16000])
def test_a_codec_refuses_bytes_that_cannot_hold_the_shape(
    name: str, data: bytes, shape: list[int]
) -> None:
    try:
        values = codec(name).decode(data, tuple(shape))
    except CodecError:
        return
    assert math.prod(shape) <= 10**6 * len(data)
    assert values.shape == tuple(shape)


@pytest.mark.parametrize("name", ["top-k:1e-300", "top-k:9e-7", "top-k:nan", "top-k:1.1"])
def test_a_fraction_that_keeps_next_to_nothing_is_no_codec(name: str) -> None:
    with pytest.raises(CodecError, match="should be top-k:FRACTION, from 1e-06 to 1"):
        codec(name)
