"""Measure bytes, time and loss of the app at each codec, in one process.

    python benchmarks/codecs.py [key=value ...] [--codecs fp32,bf16,int8,int4,2-bit]

Each codec is used for the messages to the clients and for their replies. "2-bit/int8" means
2-bit for the replies and int8 for the messages to the clients. For each codec, two clients train
the model. You can change settings with `key=value`. All other settings have their defaults.
"""

import argparse
import json
import statistics
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flwr.app import Context, RecordDict

import flower_adapter.client.compression as client_side
import flower_adapter.server.compression as server_side
from flower_adapter import RoundRecord, run_rounds
from flower_adapter.testing import LocalGrid
from nanogpt_flower import server_app
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.settings import Settings

Seconds = dict[str, list[float]]


def measure(settings: Settings) -> dict[str, Any]:
    """Run the app once in a federation, and return the sizes, the times and the losses."""
    records: list[RoundRecord] = []
    seconds: Seconds = defaultdict(list)

    def run_and_record(*args: Any, on_round: Callable[[RoundRecord], None], **kwargs: Any) -> Any:
        def both(record: RoundRecord) -> None:
            on_round(record)
            record.arrays = None
            records.append(record)

        return run_rounds(*args, on_round=both, **kwargs)

    run_config = settings.to_run_config()
    grid = LocalGrid(client_app, settings.min_clients, run_config=run_config)
    with timed(seconds), patch.object(server_app, "run_rounds", run_and_record):
        server_app.main(grid, Context(1, 0, {}, RecordDict(), run_config))
    clients = [client for record in records for client in record.train_clients]
    return {
        "uplink": settings.uplink,
        "downlink": settings.downlink,
        "losses": [round(record.metric("val-loss") or 0.0, 4) for record in records],
        "first message MB": clients[0].bytes_sent / 1e6,
        "MB down, a client and round": median_of(records, "bytes_sent", settings.min_clients),
        "MB up, a client and round": median_of(records, "bytes_received", settings.min_clients),
        **{f"{name} ms": statistics.median(took) * 1e3 for name, took in seconds.items()},
    }


def median_of(records: list[RoundRecord], name: str, num_clients: int) -> float:
    """Return the median over all rounds except the first, in megabytes for each client.

    The first round is left out because its message carries the whole model.
    """
    totals = [getattr(record, name) for record in records if record.server_round > 1]
    return statistics.median(totals) / num_clients / 1e6 if totals else float("nan")


@contextmanager
def timed(seconds: Seconds) -> Iterator[None]:
    """Measure the time of each encoding and decoding, on the clients and on the server."""

    def wrap(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return call

    with (
        patch.object(client_side, "encode", wrap("encode", client_side.encode)),
        patch.object(server_side, "encode", wrap("encode", server_side.encode)),
        patch.object(client_side, "decode", wrap("decode", client_side.decode)),
        patch.object(server_side, "decode", wrap("decode", server_side.decode)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--codecs", default="fp32,bf16,int8,int4,2-bit")
    options = parser.parse_args()
    given = tomllib.loads("\n".join(options.settings))
    for codec in options.codecs.split(","):
        uplink, _, downlink = codec.partition("/")
        codecs = {"uplink": uplink, "downlink": downlink or uplink}
        with tempfile.TemporaryDirectory() as room:
            config = {**given, **codecs, "output-dir": str(Path(room)), "sample-tokens": 0}
            print(json.dumps(measure(Settings.from_run_config(config))), flush=True)


if __name__ == "__main__":
    main()
