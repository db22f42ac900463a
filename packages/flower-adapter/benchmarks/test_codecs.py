"""Encode and decode 10.6 million parameters, compared with Flower's conversion in fp32."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord

from flower_adapter.arrays import deltas, npy

SHAPES = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 6 + [(65, 384)]
CODECS = ["bf16", "int8", "int4", "2-bit", "top-k:0.01"]
PARAMETERS = sum(rows * columns for rows, columns in SHAPES)


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {str(i): rng.standard_normal(shape, np.float32) for i, shape in enumerate(SHAPES)}


@pytest.fixture(scope="module")
def base(values: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: npy.to_array(array) for name, array in values.items()})


@pytest.fixture(scope="module")
def trained(values: dict[str, np.ndarray]) -> ArrayRecord:
    rng = np.random.default_rng(1)
    return ArrayRecord(
        {
            name: npy.to_array(array + 1e-3 * rng.standard_normal(array.shape, np.float32))
            for name, array in values.items()
        }
    )


def plain(values: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord.from_numpy_ndarrays(list(values.values()))


@pytest.mark.parametrize("codec", CODECS)
def test_encode(
    compare: Callable[..., None],
    values: dict[str, np.ndarray],
    base: ArrayRecord,
    trained: ArrayRecord,
    codec: str,
) -> None:
    """Time one whole encoding with error feedback: delta, codec, decoded arrays and residual."""
    residual = deltas.encode(trained, base, codec).residual
    compare(
        lambda: deltas.encode(trained, base, codec, residual),
        lambda: plain(values),
        reference_name="numpy to ArrayRecord, fp32",
        amount=PARAMETERS,
        unit="parameters",
        rounds=7,
    )


@pytest.mark.parametrize("codec", CODECS)
def test_decode(
    compare: Callable[..., None], base: ArrayRecord, trained: ArrayRecord, codec: str
) -> None:
    encoded = deltas.encode(trained, base, codec).arrays
    compare(
        lambda: deltas.decode(encoded, base),
        lambda: base.to_numpy_ndarrays(),
        reference_name="ArrayRecord to numpy, fp32",
        amount=PARAMETERS,
        unit="parameters",
        rounds=7,
    )
