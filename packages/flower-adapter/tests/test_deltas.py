import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_adapter.arrays.deltas import decode, encode
from flower_adapter.protocol import is_compressed

CODECS = ["fp32", "bf16", "int8", "int4", "2-bit", "top-k:0.25", "top-k"]


@pytest.mark.parametrize("codec", ["2-bit", "top-k:0.1", "int4", "int8"])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-4, 1e4), rows=st.integers(1, 20))
def test_what_the_server_decodes_adds_up_to_the_true_updates(
    codec: str, seed: int, scale: float, rows: int
) -> None:
    chance = np.random.default_rng(seed)
    base = ArrayRecord({"w": Array(np.zeros((rows, 20), np.float32))})
    constant = chance.normal(size=(rows, 20)) * chance.exponential(size=(rows, 20)) * scale
    true, decoded, residual, ratios = np.zeros_like(constant), np.zeros_like(constant), None, []
    for server_round in range(1, 49):
        update = constant + scale * chance.normal(size=constant.shape)
        update = update.astype(np.float32)
        encoded = encode(ArrayRecord({"w": Array(update)}), base, codec, residual)
        residual = encoded.residual
        true += update
        decoded += decode(encoded.arrays, base)["w"].numpy()
        if server_round in (8, 48):
            ratios.append(np.linalg.norm(true - decoded) / np.linalg.norm(true))
    # The residual is bounded, so its part in the sum falls as 1 / rounds.
    assert ratios[1] < max(0.75 * ratios[0], 0.01)
    assert np.linalg.norm(true - decoded) == pytest.approx(
        float(torch.linalg.vector_norm(residual["w"])), rel=1e-2, abs=1e-5 * np.linalg.norm(true)
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(CODECS))
def test_both_sides_decode_the_same_bits(seed: int, name: str) -> None:
    chance = np.random.default_rng(seed)
    shape = tuple(chance.integers(1, 12, chance.integers(2, 4)))

    def drawn() -> ArrayRecord:
        values = chance.normal(size=shape).astype(np.float32)
        return ArrayRecord({"w": Array(values), "b": Array(values[0]), "n": Array(np.array([3]))})

    base, arrays = drawn(), drawn()
    encoded = encode(arrays, base, name)
    assert decode(encoded.arrays, base) == encoded.decoded
    found = [is_compressed(array.stype) for array in encoded.arrays.values()]
    assert found == [True, len(shape) > 2, False]
    for array in encoded.arrays.values():
        if is_compressed(array.stype):
            with pytest.raises(TypeError, match="Unsupported serialization type"):
                array.numpy()
