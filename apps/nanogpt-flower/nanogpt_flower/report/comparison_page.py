"""Write the page of a comparison, `comparison.html`, from `comparison.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_flower.report.charts import Dot, DotRow, dot_chart
from nanogpt_flower.report.comparison_template import TEMPLATE
from nanogpt_flower.report.data import ReportError
from nanogpt_flower.report.page import render_page, write_page
from nanogpt_flower.report.text import clean, count, duration, last_component, megabytes

RESULT = "comparison.json"
_ARMS = {"alone": ("alone", "grey"), "federated": ("federated", "blue")} | {
    "one_place": ("one place", "orange")
}
_TEXTS = {
    "own": "On its own validation text",
    "everybody": "On the validation texts of all clients together",
}


def write_comparison(directory: Path) -> Path:
    """Write `comparison.html` in the directory of a comparison, and return its path.

    Raises:
        ReportError: if `comparison.json` is missing or damaged.
    """
    source = directory / RESULT
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
        content = _content(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{source} is missing or damaged: {error}") from error
    path = directory / "comparison.html"
    write_page(path, render_page(TEMPLATE, f"Why federate? {directory.name}", **content))
    return path


def name_of(client: Mapping[str, Any]) -> str:
    """Return the names of a client's plays or roles. If there are none, return its label."""
    return clean(", ".join(client["holds"]) or client["label"], 60)


def _content(result: Mapping[str, Any]) -> dict[str, Any]:
    clients = result["clients"]
    rows = [
        {
            **client,
            "gain": client["own"]["alone"] - client["own"]["federated"],
        }
        for client in clients
    ]

    def mean(text: str, arm: str) -> float:
        return float(sum(client[text][arm] for client in clients) / len(clients))

    means = {text: {arm: mean(text, arm) for arm in _ARMS} for text in _TEXTS}
    gain = means["own"]["alone"] - means["own"]["federated"]
    cost = means["everybody"]["federated"] - means["everybody"]["one_place"]
    better = sum(row["gain"] > 0 for row in rows)
    seconds = result["seconds"]
    return {
        "facts": [
            f"preset {result['preset']}",
            f"{len(clients)} clients",
            f"partition {result['partition']}",
            f"text {last_component(result['corpus'])}",
            f"{count(result['tokens_per_client'])} tokens a client",
        ],
        "better": better,
        "clients": rows,
        "means": means,
        "gain": gain,
        "cost": cost,
        "cards": [
            (
                "gain by taking part",
                f"{gain:+.4f}",
                "nats on its own text; + is a lower loss",
            ),
            (
                "cost of federating",
                f"{cost:+.4f}",
                "nats on everybody's text; + is higher",
            ),
            ("traffic", megabytes(result["bytes"]), "of the federation, both directions"),
            ("time", duration(seconds["federated"]), "of the federation, with its start"),
        ],
        "charts": [(title, _chart(clients, text)) for text, title in _TEXTS.items()],
        "settings": sorted(result["settings"].items()),
        "machine": sorted(result["machine"].items()),
        "digest": result["corpus_sha256"],
        "seconds": [(name, duration(seconds[arm])) for arm, (name, _) in _ARMS.items()],
    }


def _chart(clients: list[dict[str, Any]], text: str) -> Any:
    rows = [
        DotRow(
            name_of(client),
            [
                Dot(client[text][arm], style, f"{name}: {client[text][arm]:.4f}")
                for arm, (name, style) in _ARMS.items()
            ],
        )
        for client in clients
    ]
    return dot_chart(
        rows,
        list(_ARMS.values()),
        description=f"{_TEXTS[text]}: the loss of each client alone, federated and in one place",
        x_label="loss (nats per character)",
    )
