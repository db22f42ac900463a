"""Write the report of a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nanogpt_flower.report import reference
from nanogpt_flower.report.charts import (
    Bar,
    Reference,
    Series,
    bar_chart,
    line_chart,
    share_bar,
    sparkline,
)
from nanogpt_flower.report.data import (
    TIME_KINDS,
    ClientRound,
    Part,
    Run,
    Timing,
    perplexity,
    read_run,
)
from nanogpt_flower.report.page import render_page, write_page
from nanogpt_flower.report.run_template import TEMPLATE
from nanogpt_flower.report.text import (
    clean,
    count,
    duration,
    last_component,
    megabytes,
    ranges,
    sentence,
    short_count,
)
from nanogpt_flower.settings import Settings

REPORT = "report.html"

_PATH_SETTINGS = ("corpus", "output-dir", "resume-from", "client-state")
_SAMPLE_LENGTH = 600  # characters of the sample of a round
_FINAL_SAMPLE_LENGTH = 6000
_OPEN_SAMPLES = 9  # the page shows at most this many samples of rounds at once
_LEFT_OUT_ROWS = 200
_LEAST_DIVERGENCE = 0.01  # bits; smaller divergences have no long bar, even if they are the largest

_SCHEMES = {
    "contiguous": "Each client holds one contiguous piece of the text.",
    "iid": "The text is cut into windows of {window} characters. Each client holds an equal "
    "number of windows, which are chosen at random.",
    "quantity-skew": "The text is cut into windows of {window} characters, which are chosen at "
    "random. The clients hold unequal amounts, drawn from a Dirichlet distribution with alpha "
    "{alpha}.",
    "by-play": "Each client holds whole plays.",
    "by-speaker": "Each client holds the lines of one role.",
    "dirichlet": "Each {by} is divided among the clients in random proportions, drawn from a "
    "Dirichlet distribution with alpha {alpha}. A smaller alpha gives more unequal parts.",
}
_TIMES = {
    "training": ("blue", "the slowest client of each round trains"),
    "waiting": ("gold", "messages travel, processes start, clients wait for each other"),
    "encoding": ("purple", "the server encodes and decodes messages"),
    "averaging": ("green", "the server averages the weights"),
    "evaluating": ("orange", "clients and server compute validation losses"),
    "saving": ("grey", "the server writes the checkpoint"),
}
_MACHINE = {"memory_gib": "memory (GiB)", "gpu": "GPU", "python": "Python"}


def write_report(directory: Path, *, refresh: bool = False) -> Path:
    """Write `report.html` in the directory of a run, and return its path.

    Set `refresh` while the run goes on. The page then says so and reloads itself.

    Raises:
        ReportError: if there is no `metrics.jsonl`, or if a file is damaged. It names the file.
    """
    directory = Path(directory)
    run = read_run(directory)
    name = str(run.settings.get("run-name") or run.name)
    page = render_page(TEMPLATE, name, refresh=refresh, **_content(run, name, refresh))
    path = directory / REPORT
    write_page(path, page)
    return path


def _content(run: Run, name: str, refresh: bool) -> dict[str, Any]:
    """Compute all values of the template."""
    state = _state(run, refresh)
    tokens = run.tokens_by_round()
    figures = _Figures(run, tokens)
    shown = [r.shown_loss for r in run.rounds]
    losses = dict(zip((r.round for r in run.rounds), shown, strict=True))
    return {
        "name": name,
        "state": state,
        "state_words": _state_words(run, state),
        "message": run.message if state == "failed" else "",
        "facts": _facts(run),
        "comparison": _comparison(run, tokens),
        "cards": _cards(run, tokens),
        "loss_by_round": figures.loss_by_round(),
        "loss_by_tokens": figures.loss_by_tokens(),
        "loss_notes": figures.notes(),
        "rounds": [
            {**vars(r), "perplexity": "–" if r.shown_loss is None else _perplexity(r.shown_loss)}
            for r in run.rounds
        ],
        "tokens": tokens,
        **_samples(run, losses, final=not refresh),
        **_parts(run),
        "traffic": _traffic(run),
        "time": _time(run.timings),
        **_left_out(run.clients),
        **_settings(run),
        "footer": _footer(run),
    }


def _state(run: Run, refresh: bool) -> str:
    if refresh:
        return "running"
    if run.state in ("completed", "failed", "interrupted"):
        return run.state
    planned = run.settings.get("num-server-rounds")
    return "completed" if planned == run.rounds[-1].round else "unfinished"


def _state_words(run: Run, state: str) -> str:
    planned, last = run.settings.get("num-server-rounds"), run.rounds[-1].round
    of = f" of {planned}" if isinstance(planned, int) else ""
    return state if state == "completed" else f"{state}, round {last}{of}"


def _facts(run: Run) -> list[str]:
    launch, config, facts = run.launch, run.config, []
    if launch.get("preset"):
        facts.append(f"preset {launch['preset']}")
    clients = launch.get("clients") or len(run.labels()) or max(r.clients for r in run.rounds)
    runtime = launch.get("runtime")
    facts.append(f"{clients} clients{f' in {runtime}' if runtime else ''}")
    if config:
        corpus = config.corpus
        text = last_component(str(corpus.get("name", "?"))) if corpus else ""
        facts.append(f"text {text}" if text else "each client's own text")
        if config.parameters:
            facts.append(f"{count(config.parameters)} parameters")
    facts += [f"started {_date(launch['started'])}"] if launch.get("started") else []
    return facts


def _date(text: object) -> str:
    try:
        return _when(datetime.fromisoformat(str(text)).astimezone(UTC))
    except (ValueError, OverflowError):
        return str(text)


def _when(time: datetime) -> str:
    return f"{time.day} {time:%b %Y, %H:%M} UTC"


def _perplexity(loss: float) -> str:
    value = perplexity(loss)
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _is_reference_text(run: Run) -> bool:
    corpus = run.config.corpus if run.config else None
    return corpus is not None and corpus.get("name") in reference.CORPORA


def _comparison(run: Run, tokens: Mapping[int, int] | None) -> list[str]:
    """Compare the run with the published figures, in words."""
    last = run.rounds[-1]
    if last.shown_loss is None:
        return ["The last round has no validation loss."]
    loss = f"The validation loss is {last.shown_loss:.2f}"
    if last.round == 0:
        return [f"{loss} before training, a perplexity of {_perplexity(last.shown_loss)}."]
    seen = tokens[last.round] if tokens else None
    sentences = [f"{loss} after {count(seen)} tokens." if seen else f"{loss}."]
    if not _is_reference_text(run) or last.val_loss is None:
        return [*sentences, "No published figure is about the same text."]
    if not seen:
        sentences.append("The number of tokens is not known, so no published figure compares.")
    else:
        original = reference.original_loss(seen)
        difference = original - last.val_loss
        if seen <= reference.ORIGINAL_TOKENS:
            said = (
                f"With as many tokens, the original example had about {original:.2f} (interpolated)"
            )
        else:
            tokens_said = count(reference.ORIGINAL_TOKENS)
            said = f"The original example ended at {original:.2f} after {tokens_said} tokens"
        words = f"{abs(difference):.2f} {'lower' if difference > 0 else 'higher'}"
        sentences.append(f"{said}: this run is {words}.")
    if figure := reference.matching_nanogpt(run.settings):
        sentences.append(
            f"nanoGPT reached {figure.loss:.2f} on one machine with a model of this shape after "
            f"{count(figure.tokens)} tokens."
        )
    return sentences


@dataclass(frozen=True)
class _Card:
    name: str
    figure: str
    under: str


def _cards(run: Run, tokens: Mapping[int, int] | None) -> list[_Card]:
    last = run.rounds[-1]
    loss = last.shown_loss
    known = [(r.shown_loss, r.round) for r in run.rounds if r.shown_loss is not None]
    best, best_round = min(known, default=(math.inf, last.round))
    if loss is None:
        cards = [_Card("validation loss", "–", ""), _Card("perplexity", "–", "")]
    else:
        under = "nats per character"
        if best < loss:
            under += f"; best {best:.4f} in round {best_round}"
        else:
            under += f", {loss / math.log(2):.2f} bits"
        whose = "" if last.val_loss is not None else ", clients' mean"
        cards = [
            _Card(f"validation loss{whose}", f"{loss:.4f}", under),
            _Card("perplexity", _perplexity(loss), f"{_perplexity(known[0][0])} at the start"),
        ]
    labels = run.labels()
    cards.append(
        _Card(
            "tokens",
            count(tokens[last.round]) if tokens else "–",
            f"{len(labels)} clients, {_rounds(last.round)}" if tokens else "not known",
        )
    )
    # Round 0 has only an evaluation, so it is not a part of the mean.
    later = [t.total for t in run.timings or () if t.round]
    if run.timings:
        mean = f"{duration(sum(later) / len(later))} a round" if later else "before round 1"
        cards.append(_Card("time in rounds", duration(sum(t.total for t in run.timings)), mean))
    else:
        cards.append(_Card("time in rounds", "–", "not known"))
    if run.clients is None:
        cards.append(_Card("traffic", "–", "not known"))
    else:
        total = _Traffic.of("all", run.clients)
        if total.both == total.fp32:
            under = "all in fp32" if total.both else "no message yet"
        else:
            under = f"{total.saving} less than fp32"
        cards.append(_Card("traffic, down and up", megabytes(total.both), under))
    return cards


def _rounds(number: int) -> str:
    return f"{number:,} round{'s' * (number != 1)}"


class _Figures:
    """The charts of the losses."""

    def __init__(self, run: Run, tokens: Mapping[int, int] | None) -> None:
        self.run = run
        self.tokens = tokens
        self.compares = _is_reference_text(run) and run.rounds[-1].val_loss is not None
        self.nanogpt = reference.matching_nanogpt(run.settings) if self.compares else None
        self.last_tokens = tokens[run.rounds[-1].round] if tokens else 0

    def _series(self, x: Mapping[int, float]) -> list[Series]:
        rows = _by_label(self.run.clients or ())
        known = [r for r in self.run.rounds if r.round in x]
        lines = [
            Series(
                label,
                [(x[row.round], row.val_loss) for row in rows[label] if row.round in x],
                "client",
                legend=f"each client ({len(rows)})",
                faint=True,
            )
            for label in rows
        ]
        lines += [
            Series("clients' mean", [(x[r.round], r.client_val_loss) for r in known], "mean"),
            Series("training", [(x[r.round], r.train_loss) for r in known], "train"),
            Series("server", [(x[r.round], r.val_loss) for r in known], "server"),
        ]
        return lines

    def _nanogpt(self) -> list[Reference]:
        return [Reference("nanoGPT", self.nanogpt.loss, "nanogpt")] if self.nanogpt else []

    def loss_by_round(self) -> Markup:
        """Draw the losses over the rounds."""
        references = self._nanogpt()
        if self.compares:
            last = reference.ORIGINAL_LOSSES[-1]
            references.append(Reference("original's end", last, "original"))
        return line_chart(
            self._series({r.round: float(r.round) for r in self.run.rounds}),
            description=self._description("round"),
            x_label="round",
            y_label="loss (nats per character)",
            references=references,
            whole_x=True,
        )

    def loss_by_tokens(self) -> Markup | None:
        """Draw the losses over the tokens, with the curve of the original example."""
        if not self.tokens or not self.last_tokens:
            return None
        series = self._series({r: float(n) for r, n in self.tokens.items()})
        if self.compares:
            end = min(self.last_tokens, reference.ORIGINAL_TOKENS)
            points = [(n, loss) for n, loss in reference.ORIGINAL_POINTS if n < end]
            points.append((end, reference.original_loss(end)))
            series.insert(0, Series("original", points, "original", legend="original example"))
        return line_chart(
            series,
            description=self._description("number of tokens"),
            x_label="training tokens of all clients",
            y_label="loss (nats per character)",
            references=self._nanogpt(),
            format_x=short_count,
        )

    def _description(self, x: str) -> str:
        last = self.run.rounds[-1]
        loss = "not known" if last.shown_loss is None else f"{last.shown_loss:.4f}"
        return (
            f"Losses by {x}: server, mean of the clients and each client. The last validation "
            f"loss is {loss}."
        )

    def notes(self) -> list[str]:
        """Explain the lines of the charts."""
        notes = []
        if self.tokens is None:
            notes.append(
                "There is no chart by tokens, because the tokens of some rounds are not known."
            )
        if not self.compares:
            return notes
        config = self.run.config
        assert config is not None
        assert config.corpus is not None
        notes.append(
            "The original example had 2 clients and 5 rounds of 1,638,400 tokens. Between its "
            "rounds its loss is interpolated. Its rounds are not as long as the rounds of this "
            "run, so the chart by round shows only its last loss."
        )
        if self.nanogpt:
            notes.append(
                f"The line of nanoGPT is the loss {self.nanogpt.loss:g} that it publishes for a "
                f"model of this shape, trained on one machine with "
                f"{count(self.nanogpt.tokens)} tokens."
            )
        else:
            notes.append(
                "There is no line of nanoGPT: its published losses are for models of other shapes."
            )
        if config.corpus["name"] != "tiny-shakespeare":
            notes.append(
                "These figures are of Tiny Shakespeare. The text of this run is nearly the same, "
                "so small differences are expected."
            )
        partition = self.run.partition
        if partition and partition.options.get("split", "end") != "end":
            notes.append(
                "The published losses are on the last tenth of the text. This partition takes its "
                "validation text from all parts of the text, so the losses compare only roughly."
            )
        return notes


def _by_label(rows: Iterable[ClientRound]) -> dict[str, list[ClientRound]]:
    groups: dict[str, list[ClientRound]] = {}
    for row in rows:
        groups.setdefault(row.client, []).append(row)
    return groups


def _samples(run: Run, losses: Mapping[int, float | None], *, final: bool) -> dict[str, Any]:
    """Choose the sample to show large, and the samples of rounds to show at once.

    A long run shows samples at rounds that lie further and further apart, since a model changes
    most in its first rounds.
    """
    texts = [(r, text) for r, text in run.samples if text.strip()]
    newest = None
    if final and run.final_sample and run.final_sample.strip():
        newest = {"title": "The final sample", "text": run.final_sample}
    elif texts:
        server_round, text = texts.pop()
        newest = {"title": f"The sample after round {server_round}", "text": text}
    if newest:
        newest["text"] = clean(newest["text"].strip("\r\n"), _FINAL_SAMPLE_LENGTH, lines=True)
    shown = [
        {
            "round": server_round,
            "loss": losses.get(server_round),
            "text": clean(text.strip("\r\n"), _SAMPLE_LENGTH, lines=True),
        }
        for server_round, text in texts
    ]
    chosen = _spread(len(shown))
    return {
        "newest": newest,
        "samples": {
            "open": [shown[i] for i in chosen],
            "others": [sample for i, sample in enumerate(shown) if i not in chosen],
        },
    }


def _spread(number: int) -> list[int]:
    """Choose indexes of a list, at most `_OPEN_SAMPLES`. The gaps between them grow."""
    if number <= _OPEN_SAMPLES:
        return list(range(number))
    steps = [number ** (i / (_OPEN_SAMPLES - 1)) for i in range(_OPEN_SAMPLES)]
    chosen: list[int] = []
    for step in steps:  # the first steps are less than 1 apart
        chosen.append(max(round(step) - 1, chosen[-1] + 1 if chosen else 0))
    return chosen


def _parts(run: Run) -> dict[str, Any]:
    rows = _by_label(run.clients or ())
    partition = run.partition
    if partition:
        parts: Sequence[Part] = partition.parts
    else:
        parts = [_part_of(label, rows[label]) for label in rows]
    losses = [row.val_loss for row in run.clients or () if row.val_loss is not None]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    largest = max((p.divergence or 0.0 for p in parts), default=0.0)
    largest = max(largest, _LEAST_DIVERGENCE)
    shown = []
    for part in parts:
        points = [(float(row.round), row.val_loss) for row in rows.get(part.label, ())]
        known = [loss for _, loss in points if loss is not None]
        divergence = part.divergence
        shown.append(
            {
                "part": part,
                "divergence": "" if divergence is None else share_bar(divergence / largest),
                "spark": sparkline(points, low, high) if len(known) > 1 else "",
                "last_loss": known[-1] if known else None,
            }
        )
    return {
        "parts": shown,
        "divided": partition is not None,
        "client_losses": bool(losses),
        "characters": [_sum(p.train for p in parts), _sum(p.val for p in parts)],
        "scheme": _scheme(run),
    }


def _part_of(label: str, rows: Sequence[ClientRound]) -> Part:
    """Take the sizes of a client's text from its rounds."""
    train = next((r.train_characters for r in rows if r.train_characters is not None), None)
    val = next((r.val_characters for r in rows if r.val_characters is not None), None)
    return Part(label, train, val, None, None, None)


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _scheme(run: Run) -> list[str]:
    partition = run.partition
    if partition is None:
        if run.clients is None:
            return ["The parts of the clients are not known: there is no parts.json."]
        return ["Only the lengths of the texts are known: there is no parts.json."]
    words = [f"The partition is {partition.scheme}."]
    options = {key: str(value) for key, value in partition.options.items()}
    if partition.scheme in _SCHEMES:
        defaults = {"window": "equal", "alpha": "not known", "by": "play"}
        words.append(_SCHEMES[partition.scheme].format_map(defaults | options))
    if options:
        words.append(f"Options: {', '.join(f'{k} {v}' for k, v in options.items())}.")
    if partition.left_out:
        words.append(f"No client holds the other {partition.left_out:,} characters.")
    return words


@dataclass(frozen=True)
class _Traffic:
    """The bytes of some messages, and the bytes that they would have without a codec."""

    name: str
    down: int
    up: int
    fp32: int

    @classmethod
    def of(cls, name: str, rows: Sequence[ClientRound]) -> "_Traffic":
        return cls(
            name,
            sum(row.bytes_down for row in rows),
            sum(row.bytes_up for row in rows),
            sum(row.fp32_bytes_down + row.fp32_bytes_up for row in rows),
        )

    @property
    def both(self) -> int:
        return self.down + self.up

    @property
    def saving(self) -> str:
        return f"{self.fp32 / self.both:.1f}×" if self.both else "–"


def _traffic(run: Run) -> dict[str, Any] | None:
    if run.clients is None:
        return None
    rounds: dict[int, list[ClientRound]] = {}
    for row in run.clients:
        rounds.setdefault(row.round, []).append(row)
    by_round = [_Traffic.of(str(r), rows) for r, rows in sorted(rounds.items())]
    by_client = [_Traffic.of(label, rows) for label, rows in _by_label(run.clients).items()]
    total = _Traffic.of("all", run.clients)
    codecs = [str(run.settings.get(key, "fp32")) for key in ("uplink", "downlink")]
    sent = f"The messages carried {megabytes(total.both)} of arrays"
    if total.both == total.fp32:
        summary = f"{sent}, all in fp32."
    else:
        summary = (
            f"{sent}. In fp32 they would have carried {megabytes(total.fp32)}, which is "
            f"{total.saving} as much. Clients send in {codecs[0]}, the server in {codecs[1]}."
        )
    chart = bar_chart(
        [
            Bar(
                row.name,
                (row.down, row.up),
                f"round {row.name}: {row.down:,} bytes to clients, {row.up:,} bytes to the server, "
                f"{row.fp32:,} bytes in fp32",
                outline=None if total.both == total.fp32 else row.fp32,
            )
            for row in by_round
        ],
        [("to clients", "blue"), ("to the server", "orange")],
        description=f"Bytes by round. The sum is {total.both:,} bytes.",
        label="round",
        value_label="MB",
        format_value=lambda value: f"{value / 1e6:g}",
        outline="" if total.both == total.fp32 else "in fp32",
    )
    return {
        "summary": clean(summary, 400),
        "chart": chart if by_round else "",
        "all": total,
        "tables": [
            {"name": "client", "rows": by_client, "summary": f"All {len(by_client)} clients"},
            {"name": "round", "rows": by_round, "summary": f"All {_rounds(len(by_round))}"},
        ],
    }


def _time(timings: Sequence[Timing] | None) -> dict[str, Any] | None:
    if not timings:
        return None
    shares = [timing.shares() for timing in timings]
    sums = [sum(column) for column in zip(*shares, strict=True)]
    total = sum(sums)
    bars = []
    for timing, values in zip(timings, shares, strict=True):
        parts = zip(TIME_KINDS, values, strict=True)
        words = ", ".join(f"{kind} {duration(value)}" for kind, value in parts if value > 0)
        bars.append(Bar(str(timing.round), values, f"round {timing.round}: {words}"))
    summary = f"The rounds took {duration(total)}. "
    if not any(timing.client_training for timing in timings):
        summary += "No client reported its own time, so waiting counts as training."
    else:
        kind, most = max(zip(TIME_KINDS, sums, strict=True), key=lambda pair: pair[1])
        summary += f"Most of it, {100 * most / total if total else 0:.0f} %, went to {kind}."
    return {
        "summary": summary,
        "total": total,
        "rows": [
            {
                "name": kind,
                "seconds": seconds,
                "share": seconds / total if total else 0.0,
                "words": _TIMES[kind][1],
            }
            for kind, seconds in zip(TIME_KINDS, sums, strict=True)
        ],
        "chart": bar_chart(
            bars,
            [(kind, _TIMES[kind][0]) for kind in TIME_KINDS],
            description=f"Seconds of each round by activity. The sum is {duration(total)}.",
            label="round",
            value_label="seconds",
            format_value="{:g}".format,
            horizontal=True,
        ),
    }


def _left_out(rows: Sequence[ClientRound] | None) -> dict[str, Any]:
    """Join the rounds in which one client was left out of one phase for one reason."""
    if rows is None:
        return {"left_out": None, "more_left_out": 0}
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        for left in row.left_out:
            rounds.setdefault((left.phase, left.client, left.reason), []).append(row.round)
    found = [
        {"rounds": ranges(missed), "phase": phase, "client": client, "reason": reason}
        for (phase, client, reason), missed in rounds.items()
    ]
    return {"left_out": found[:_LEFT_OUT_ROWS], "more_left_out": len(found[_LEFT_OUT_ROWS:])}


def _settings(run: Run) -> dict[str, Any]:
    defaults = Settings().to_run_config()
    rows = [
        {
            "key": key,
            "value": _shown(key, value),
            "default": _shown(key, defaults[key]) if key in defaults else "–",
            "changed": key in defaults and value != defaults[key],
        }
        for key, value in run.settings.items()
    ]
    config = run.config
    seed = run.settings.get("seed", "not known")
    if config is None:
        return {"settings": rows, "seed": seed, "tables": []}
    return {
        "settings": rows,
        "seed": seed,
        "tables": [
            ("Text", _corpus(config.corpus) if config.corpus else []),
            ("Machine", _rows(config.machine)),
            ("Server", _rows(config.server)),
            ("Versions", _rows(config.versions)),
        ],
    }


def _shown(key: str, value: object) -> str:
    text = str(value)
    if key in _PATH_SETTINGS:
        text = last_component(text)
    return text or "(empty)"


def _corpus(corpus: Mapping[str, Any]) -> list[tuple[str, str]]:
    path = str(corpus.get("name", ""))
    name = last_component(path)
    rows = []
    for key, value in corpus.items():
        if value in (None, ""):
            continue
        text = f"{value:,}" if isinstance(value, int) else str(value)
        if path != name:  # the other fields can repeat the path
            text = text.replace(path, name)
        rows.append(("SHA-256" if key == "sha256" else key, text))
    return rows


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if value in (None, "", []):
            continue
        text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((_MACHINE.get(key, key.replace("_", " ")), text))
    return rows


def _footer(run: Run) -> str:
    version = run.config.versions.get("nanogpt-flower") if run.config else None
    said = f" {version}" if version else ""
    return sentence(f"Written on {_when(datetime.now(UTC))} from a run of nanogpt-flower{said}.")
