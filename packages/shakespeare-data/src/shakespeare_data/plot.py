"""Draw a plot of a partition. This module needs matplotlib (extra `plot`)."""

from pathlib import Path

import numpy as np

from shakespeare_data.errors import DataError
from shakespeare_data.partition import Partition

_TRAIN, _VAL, _DIVERGENCE = "#33608c", "#e1a02f", "#8c3333"


def plot_partition(partition: Partition, path: str | Path) -> None:
    """Write a PNG file with two bar charts: the size and the divergence of each part.

    The first chart shows the number of characters for training and for validation. The second chart
    shows the divergence, which `PartReport` explains. Raises `DataError` if matplotlib is not
    installed or if the file `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise DataError("a plot needs matplotlib: pip install matplotlib") from error
    report = partition.report()
    clients = np.array([part.client for part in report])
    train = np.array([part.train for part in report])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    sizes, divergences = figure.subplots(2, 1, sharex=True)
    sizes.bar(clients, train, color=_TRAIN, label="train")
    sizes.bar(clients, [part.val for part in report], bottom=train, color=_VAL, label="validation")
    sizes.set_ylabel("characters")
    sizes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    sizes.legend(frameon=False, ncols=2)
    sizes.set_title(_title(partition), fontsize=11)
    divergences.bar(clients, [part.divergence for part in report], color=_DIVERGENCE)
    divergences.set_ylabel("divergence from the whole text\n(Jensen-Shannon, bits)")
    divergences.set_xlabel("client")
    divergences.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (sizes, divergences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _title(partition: Partition) -> str:
    options = [
        f"{name} {partition.options[name]}"
        for name in ("by", "alpha", "window")
        if name in partition.options
    ]
    left_out = partition.left_out / len(partition.corpus.text)
    rest = f"{left_out:.1%} left out" if left_out else "nothing left out"
    scheme = " ".join([partition.scheme, *([f"({', '.join(options)})"] if options else [])])
    return f"{partition.corpus.name}: {scheme}, seed {partition.seed}, {rest}"
