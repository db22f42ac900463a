import logging
from collections.abc import Iterator

import pytest
from flwr.clientapp import ClientApp

from flower_adapter.testing import LocalGrid


@pytest.fixture(autouse=True, scope="session")
def server_identity() -> None:
    """Let every test make messages. The first LocalGrid gives the process its identity."""
    LocalGrid(ClientApp(), num_nodes=0)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture Flower's logger, which need not propagate to the root, where caplog listens."""
    logger = logging.getLogger("flwr")
    caplog.clear()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = propagate
