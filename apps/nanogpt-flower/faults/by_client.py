"""Group B: what a client answers, and what this does to the run of the others."""

import os
import random
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from faults.answers import (
    arrays_of,
    first,
    from_node,
    lengthened,
    metrics_of,
    norm,
    refusing,
    silent,
    with_array,
    with_body,
    with_header,
    with_label,
    with_metrics,
    with_mutated_header,
    with_values,
)
from faults.contract import LONGEST_REASON
from faults.matrix import Outcome, expect, fault
from faults.runs import (
    ALL,
    HONEST,
    HOSTILE,
    ROUNDS,
    PowerCut,
    captured,
    compared,
    completed,
    learn_labels,
    left_out,
    new_clients,
    run,
    same_result,
    settings,
    undisturbed,
)
from faults.wire import Client, WireGrid, node_id, only
from flower_adapter import protocol, run_rounds, to_arrays, torch_client_app
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer

WITHOUT = "the client is left out, and the others get the weights of a run without it"
NO_EFFECT = "the client is left out, or what it added is ignored; the run goes on"
LARGEST = 1.7e308  # nearly the largest double


# --- C1, C2: arrays


@fault("B", "C1", WITHOUT)
def header_with_deep_brackets(directory: Path) -> Outcome:
    """A npy header nests 3,000 brackets, so that Python's parser ends with RecursionError."""
    return left_out(directory, only([HOSTILE], with_header(b"(" * 3000 + b")" * 3000 + b"\n")))


@fault("B", "C1", WITHOUT)
def header_with_an_open_bracket(directory: Path) -> Outcome:
    """A npy header never closes a bracket, so that numpy's reader ends with TokenError."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3L, ((\n"
    return left_out(directory, only([HOSTILE], with_header(header)))


@fault("B", "C1", WITHOUT)
def header_of_a_huge_array(directory: Path) -> Outcome:
    """A npy header announces 10^18 values, for which a reader would ask for memory."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"
    return left_out(directory, only([HOSTILE], with_header(header)))


@fault("B", "C1", WITHOUT)
def header_of_python_objects(directory: Path) -> Outcome:
    """A npy header announces Python objects, which numpy would unpickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return left_out(directory, only([HOSTILE], with_header(header)))


@fault("B", "C1", "all eight clients are left out of all rounds")
def headers_with_random_bytes(directory: Path) -> Outcome:
    """Eight of eleven clients send npy headers with one to four random bytes, 24 in all."""
    hostile = range(3, 11)
    answer = only(hostile, with_mutated_header(random.Random(1)))
    return left_out(directory, answer, numbers=range(11), hostile=hostile, of=11)


@fault("B", "C1", WITHOUT)
def truncated_values(directory: Path) -> Outcome:
    """An array ends 100 bytes too early."""

    def change(reply: Message) -> None:
        first(reply).data = first(reply).data[:-100]

    return left_out(directory, only([HOSTILE], change))


@fault("B", "C1", WITHOUT)
def damaged_compressed_array(directory: Path) -> Outcome:
    """With the codec 2-bit, an array has one byte too few."""

    def change(reply: Message) -> None:
        first(reply).data = first(reply).data[:-1]

    return left_out(directory, only([HOSTILE], change), uplink="2-bit")


@fault("B", "C2", WITHOUT)
def declared_dtype_unlike_the_contained(directory: Path) -> Outcome:
    """An array declares float32 and holds float64."""

    def change(reply: Message) -> None:
        array = first(reply)
        array.data = Array(array.numpy().astype(np.float64)).data

    return left_out(directory, only([HOSTILE], change))


@fault("B", "C2", WITHOUT)
def declared_shape_unlike_the_contained(directory: Path) -> Outcome:
    """An array declares 16,000 x 16,000 values over the bytes of a small one."""
    return left_out(directory, only([HOSTILE], with_array(shape=(16_000, 16_000))))


@fault("B", "C2", WITHOUT)
def object_that_flower_cannot_put_together(directory: Path) -> Outcome:
    """The metrics of a reply are bytes that Flower cannot read, so the pull of the reply raises."""
    return left_out(directory, only([HOSTILE], with_body("MetricRecord", b"\xff\xff\xff")))


@fault("B", "C2", WITHOUT)
def values_not_finite(directory: Path) -> Outcome:
    """All weights of a client are NaN."""
    return left_out(directory, only([HOSTILE], with_values(lambda v: np.full_like(v, np.nan))))


@fault("B", "C2", WITHOUT)
def ten_thousand_more_arrays(directory: Path) -> Outcome:
    """A reply holds 10,000 arrays that the model does not have."""

    def change(reply: Message) -> None:
        arrays_of(reply).update({f"more.{n}": Array(np.zeros(1)) for n in range(10_000)})

    return left_out(directory, only([HOSTILE], change), num_server_rounds=1)


# --- C3, C4, C6: metrics


def harmless(directory: Path, change: Any, **changes: Any) -> Outcome:
    """Run with a hostile client. Expect the weights of a run without it, or of an honest one."""
    finished = run(directory, ALL, answer=only([HOSTILE], change), **changes)
    without, whole = undisturbed(HONEST, **changes), undisturbed(ALL, **changes)
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "counted, without effect on the others"
    return same_result(happened, finished, without, *([] if reasons else [whole]))


@fault("B", "C3", NO_EFFECT)
def extra_metric(directory: Path) -> Outcome:
    """A client returns a metric that no other client has."""
    return harmless(directory, with_metrics(surprise=1.0))


@fault("B", "C3", NO_EFFECT)
def missing_metric(directory: Path) -> Outcome:
    """A client does not return its training loss."""
    return harmless(directory, with_metrics(train_loss=None))


@fault("B", "C3", NO_EFFECT)
def renamed_metric(directory: Path) -> Outcome:
    """A client returns its training loss under another name."""
    return harmless(directory, with_metrics(train_loss=None, Train_Loss=1.0))


@fault("B", "C3", NO_EFFECT)
def list_in_place_of_a_number(directory: Path) -> Outcome:
    """A client returns a list of three numbers as its training loss."""
    return harmless(directory, with_metrics(train_loss=[1.0, 2.0, 3.0]))


@fault("B", "C3", NO_EFFECT)
def ten_thousand_metrics(directory: Path) -> Outcome:
    """A client returns 10,000 metrics with names of its own."""
    more = {f"m{n}": float(n) for n in range(10_000)}
    return harmless(directory, with_metrics(**more), num_server_rounds=1)


@fault("B", "C3", WITHOUT)
def two_metric_records(directory: Path) -> Outcome:
    """A reply holds two records of metrics."""

    def change(reply: Message) -> None:
        reply.content["again"] = MetricRecord({"num-examples": 1})

    return left_out(directory, only([HOSTILE], change))


@fault("B", "C4", WITHOUT)
def num_examples_of_1e300(directory: Path) -> Outcome:
    """A client says that it has 1e300 examples, which would replace the average by its weights."""
    return left_out(directory, only([HOSTILE], with_metrics(num_examples=1e300)))


@fault("B", "C4", WITHOUT)
def num_examples_of_a_half(directory: Path) -> Outcome:
    """A client says that it has half an example."""
    return left_out(directory, only([HOSTILE], with_metrics(num_examples=0.5)))


@fault("B", "C4", WITHOUT)
def num_examples_of_5e_324(directory: Path) -> Outcome:
    """A client says that it has 5e-324 examples, the smallest number above 0."""
    return left_out(directory, only([HOSTILE], with_metrics(num_examples=5e-324)))


@fault("B", "C4", "its weight is reduced to 10 times the median of the round, and this is said")
def num_examples_of_2_to_53(directory: Path) -> Outcome:
    """A client says that it has 2^53 examples, far more than the others."""
    answer = only([HOSTILE], with_metrics(num_examples=2**53))
    finished, whole = run(directory, ALL, answer=answer), undisturbed(ALL)
    completed(finished, whole)
    outcome = compared("its weight was reduced", finished, whole)
    reduced = re.findall(r"its weight .* is reduced to", finished.log)
    expect(reduced, "the log does not say that a weight was reduced", outcome)
    assert finished.loss is not None
    assert whole.loss is not None
    expect(abs(finished.loss - whole.loss) < 0.1, "the client has replaced the average", outcome)
    return outcome


@fault("B", "C4", WITHOUT)
def list_of_num_examples(directory: Path) -> Outcome:
    """A client returns a list as its number of examples."""
    return left_out(directory, only([HOSTILE], with_metrics(num_examples=[1, 2, 3])))


@fault("B", "C6", "the run completes, writes finite files, and can be resumed")
def metrics_near_the_largest_double(directory: Path) -> Outcome:
    """A client returns losses of 1.7e308, of which the weighted sum overflows."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        phase = message.metadata.message_type
        if number == HOSTILE and phase in ("train", "evaluate"):
            metrics_of(reply)[f"{phase.replace('evaluate', 'val')}-loss"] = LARGEST
        return reply

    def cut_off(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        if protocol.config_of(message).get(protocol.SERVER_ROUND) == ROUNDS:
            raise PowerCut
        return answer(grid, number, message, reply)

    first = run(directory, ALL, answer=cut_off)
    if not isinstance(first.error, PowerCut):
        completed(first, undisturbed(HONEST))
    finished = run(directory, ALL, answer=answer, resume=True)
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "the loss is out of the mean"
    references = [undisturbed(HONEST), *([] if reasons else [undisturbed(ALL)])]
    outcome = same_result(f"{happened}; resumed", finished, *references)
    numbers = [value for row in finished.lines("metrics") for value in row.values()]
    expect(not any(value and value > 1e6 for value in numbers), f"metrics are {numbers}", outcome)
    return outcome


# --- C5, clipping


@fault("B", "C5", "all three are left out, wherever their labels are in the order")
def three_of_fifty_collude(directory: Path) -> Outcome:
    """Three of fifty clients, whose labels come first, send 1,000 times their update."""
    changes: dict[str, Any] = {"of": 50, "num_server_rounds": 1, "fraction_evaluate": 0.0}
    clients = new_clients(directory, range(50), of=50)
    learn_labels(clients, settings({}))
    hostile = sorted(clients, key=lambda number: str(clients[number].label))[:3]
    answer = lengthened(set(hostile), 1000.0)
    return left_out(directory, answer, numbers=range(50), hostile=hostile, **changes)


@fault("B", "clip", WITHOUT)
def update_of_a_thousand_times(directory: Path) -> Outcome:
    """A client sends 1,000 times its update."""
    return left_out(directory, lengthened({HOSTILE}, 1000.0))


@fault("B", "clip", "its part in the average is an update of 3 times the median's length")
def update_of_ten_times(directory: Path) -> Outcome:
    """A client sends 10 times its update."""
    updates: dict[int, tuple[float, dict[str, Any]]] = {}  # number of examples, update

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        lengthened({HOSTILE}, 10.0)(grid, number, message, reply)
        config = protocol.config_of(message)
        if message.metadata.message_type == "train" and config[protocol.SERVER_ROUND] == 1:
            before = values_of(message)
            update = {name: v - before[name] for name, v in values_of(reply).items()}
            updates[number] = float(str(metrics_of(reply)["num-examples"])), update
        return reply

    finished = run(directory, ALL, answer=answer)
    reference = undisturbed(ALL)
    completed(finished, reference)
    before, after = (
        next(
            values_of(message)
            for _, message in finished.grid.messages("train")
            if protocol.config_of(message)[protocol.SERVER_ROUND] == server_round
        )
        for server_round in (1, 2)
    )
    total = sum(weight for weight, _ in updates.values())
    weight, sent = updates[HOSTILE]
    counted = {}  # what of the client's update is in the average
    for name in before:
        others = sum(updates[n][0] * updates[n][1][name] for n in HONEST)
        counted[name] = ((after[name] - before[name]) * total - others) / weight
    norms = sorted(norm(update) for _, update in updates.values())
    times = norm(counted) / norms[1], norm(counted) / norms[2]
    happened = (
        f"its update of {norm(sent) / norms[1]:.1f} times the median counted as "
        f"{times[0]:.2f} times"
    )
    outcome = compared(happened, finished, reference)
    expect(times[1] <= 3.01 and times[0] >= 2.5, happened, outcome)
    return outcome


def values_of(message: Message) -> dict[str, Any]:
    """Return the arrays of a message as float64."""
    return {name: a.numpy().astype(np.float64) for name, a in arrays_of(message).items()}


# --- C7, C8, labels: texts and memory


def error_text(directory: Path, reason: str, rounds: int = ROUNDS) -> Outcome:
    """Run with a client that answers with an error. Check the texts of the run."""
    answer = refusing([HOSTILE], reason)
    finished = run(directory, ALL, answer=answer, num_server_rounds=rounds)
    outcome = same_result("left out", finished, undisturbed(HONEST, num_server_rounds=rounds))
    reasons = finished.reasons()
    longest = max(map(len, reasons), default=0)
    outcome.happened = f"left out; {longest} characters of the reason are kept"
    expect(len(reasons) == rounds, f"{len(reasons)} reasons in {rounds} rounds", outcome)
    expect(longest <= LONGEST_REASON, f"{longest:,} characters are kept", outcome)
    written = [p for p in finished.directory.iterdir() if p.suffix in (".jsonl", ".html", ".json")]
    texts = {"the log": finished.log} | {p.name: p.read_text("utf-8") for p in written}
    for name, text in texts.items():
        expect(len(text) < 2_000_000, f"{name} has {len(text):,} characters", outcome)
        odd = {c for c in text if not c.isprintable() and c not in "\n\t"} & set(reason)
        expect(not odd, f"{name} has the control characters {sorted(map(repr, odd))}", outcome)
        forged = any(line.startswith(FORGED) for line in text.splitlines())
        expect(not forged, f"a line of {name} was written by the client", outcome)
    return outcome


FORGED = "    9      0.0001"


@fault("B", "C7", "about 500 characters of the reason are kept")
def error_reason_of_101_mb(directory: Path) -> Outcome:
    """A client gives a reason of 101 MB for its error."""
    return error_text(directory, "ab " * 33_700_000, rounds=1)


@fault("B", "C7", "control characters are escaped in the log, the table and all files")
def error_reason_with_terminal_escapes(directory: Path) -> Outcome:
    """A reason has terminal escapes, an overwritten line and a forged row of the table."""
    return error_text(directory, f"\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eoops\n{FORGED}\x00\x08")


@fault("B", "C8", "the run goes on and keeps nothing of it")
def record_of_16_mb(directory: Path) -> Outcome:
    """A reply holds a config record of 16 MB beside its arrays, and arrives last."""

    def change(reply: Message) -> None:
        reply.content["more"] = ConfigRecord({"bytes": os.urandom(16_000_000)})

    changes: dict[str, Any] = {"num_server_rounds": 1}
    answer = only([HOSTILE], change)
    finished = run(directory, ALL, answer=answer, delay={HOSTILE: 0.5}, **changes)
    without, whole = undisturbed(HONEST, **changes), undisturbed(ALL, **changes)
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "the record is ignored"
    outcome = same_result(happened, finished, without, whole)
    size = sum(path.stat().st_size for path in finished.directory.rglob("*") if path.is_file())
    expect(size < 5_000_000, f"the run's directory has {size:,} bytes", outcome)
    return outcome


def label_fault(directory: Path, label: Any) -> Outcome:
    """Run with a client that sends another label."""
    finished = run(directory, ALL, answer=only([HOSTILE], with_label(label)))
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "counted, under a harmless label"
    references = [undisturbed(HONEST), undisturbed(ALL)]
    outcome = same_result(happened, finished, *references, rounding=True)
    texts = [finished.log, (finished.directory / "clients.jsonl").read_text("utf-8")]
    for text in texts:
        expect(len(text) < 1_000_000, f"a text has {len(text):,} characters", outcome)
        expect("\x1b" not in text, "a terminal escape is in the log or the files", outcome)
    return outcome


@fault("B", "C7", "the label is cut or the client left out; the log stays short")
def label_of_10_mb(directory: Path) -> Outcome:
    """A client's label has 10 million characters."""
    return label_fault(directory, "x" * 10_000_000)


@fault("B", "C7", "the label is escaped, or the client left out")
def label_with_terminal_escapes(directory: Path) -> Outcome:
    """A client's label has terminal escapes and line breaks."""
    return label_fault(directory, f"\x1b[2J\x1b[31m\n{FORGED}")


@fault("B", "C7", "the run goes on; both count, or the second is left out")
def label_of_another_client(directory: Path) -> Outcome:
    """A client has the label of another one, to take its place in the order."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        label = grid.clients[HONEST[0]].label
        if number == HOSTILE and not reply.has_error() and protocol.CLIENT in reply.content:
            reply.content.config_records[protocol.CLIENT][protocol.LABEL] = label or "text"
        return reply

    finished = run(directory, ALL, answer=answer)
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "both counted"
    # The order of the mean is another one. The weights then differ in their last bits, and clients
    # whose draws follow from the weights draw other windows.
    completed(finished, undisturbed(ALL))
    return compared(happened, finished, undisturbed(ALL))


# --- C9: buffers


class WithCounter(torch.nn.Module):
    """A tiny model with an integer buffer, as BatchNorm has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)


def count_to_ten(model: WithCounter, config: ConfigRecord, context: Context) -> dict[str, float]:
    """Count ten batches."""
    for seed in range(10):
        model.norm(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)))
    return {"num-examples": 40}


@fault("B", "C9", "the count of the others is not bent")
def integer_buffer_of_2_to_62(directory: Path) -> Outcome:
    """A client returns 2^62 in an integer buffer that the others have counted to 10."""
    app = torch_client_app(lambda config, context: WithCounter(), count_to_ten)
    places = [{"partition-id": number, "num-partitions": len(ALL)} for number in ALL]
    clients = {number: Client(app, place) for number, place in zip(ALL, places, strict=True)}

    def change(reply: Message) -> None:
        arrays_of(reply)["norm.num_batches_tracked"] = Array(np.array(2**62))

    grid = WireGrid(clients, {}, answer=only([HOSTILE], change))
    with captured():
        result = run_rounds(
            grid, FedAvg(fraction_evaluate=0.0), to_arrays(WithCounter()), num_rounds=ROUNDS
        )
    count = int(result.arrays["norm.num_batches_tracked"].numpy())
    happened = f"after {ROUNDS} rounds the count is {count:,}, should be {10 * ROUNDS}"
    expect(0 < count <= 30 * ROUNDS, happened)
    return Outcome(happened)


# --- A1, A2, P5: silence and refusals


@fault("B", "A1", "the round ends at its timeout, and by default there is one")
def silent_client(directory: Path) -> Outcome:
    """A client never answers."""
    default = Settings().round_timeout
    changes: dict[str, Any] = {"round_timeout": 1.0, "num_server_rounds": 2}
    answer = silent({HOSTILE})
    outcome = left_out(directory, answer, **changes)
    text = f"the default of round-timeout is {default:g} s"
    expect(0 < default <= 24 * 3600, f"{text}, which never ends", outcome)
    outcome.happened += f"; {text}"
    return outcome


@fault("B", "A1", "the run goes on, and nothing is lost")
def silence_about_the_label(directory: Path) -> Outcome:
    """A client does not answer the question for its label."""
    changes: dict[str, Any] = {"round_timeout": 2.0}
    answer = silent({HOSTILE}, "query")
    finished = run(directory, ALL, answer=answer, **changes)
    return same_result("its replies counted", finished, undisturbed(ALL, **changes))


def no_text(directory: Path, vocabulary: str) -> Outcome:
    """Run with a server that has no text, and with a client that tells a false vocabulary."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        if number == HOSTILE and message.metadata.message_type == "query.vocabulary":
            reply.content.config_records["client"]["tokenizer"] = vocabulary
        return reply

    finished = run(directory, ALL, answer=answer, corpus="none")
    references = [undisturbed(numbers, corpus="none") for numbers in (HONEST, ALL)]
    happened = "the vocabulary of the majority is used"
    return same_result(happened, finished, *references)


@fault("B", "A2", "the majority's vocabulary is used, and the run goes on")
def false_vocabulary(directory: Path) -> Outcome:
    """The server has no text, and one of four clients tells a vocabulary of its own."""
    return no_text(directory, CharTokenizer.from_text("xyz").to_json())


@fault("B", "A2", "the client is left out, and the run goes on")
def vocabulary_that_is_no_json(directory: Path) -> Outcome:
    """The server has no text, and one of four clients tells a vocabulary that is not JSON."""
    return no_text(directory, "[" * 100_000)


@fault("B", "A2", "the client is left out, and the run goes on")
def vocabulary_refused(directory: Path) -> Outcome:
    """The server has no text, and one of four clients refuses to tell its vocabulary."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        if number == HOSTILE and message.metadata.message_type == "query.vocabulary":
            return Message(Error(2, "data: no"), reply_to=message)
        return reply

    finished = run(directory, ALL, answer=answer, corpus="none")
    references = [undisturbed(numbers, corpus="none") for numbers in (HONEST, ALL)]
    return same_result("the others' vocabulary is used", finished, *references)


@fault("B", "P5", "the first round fails, and no client gets the weights of the tenth")
def nine_of_ten_refuse(directory: Path) -> Outcome:
    """Nine of ten clients refuse in the first round, so that the average is the tenth's weights."""
    answer = refusing(range(9), "policy: not today", rounds=[1])
    finished = run(directory, range(10), of=10, answer=answer)
    reference = undisturbed(range(10), of=10)
    completed(finished, reference)
    sent = {
        protocol.config_of(message)[protocol.SERVER_ROUND]: values_of(message)
        for _, message in finished.grid.messages("train")
    }
    same = all(np.array_equal(sent[1][name], sent[2][name]) for name in sent[1])
    outcome = compared("the first round failed, the weights stayed", finished, reference)
    expect(same, "the clients got the weights of one client", outcome)
    expect(finished.rounds == ROUNDS - 1, f"{finished.rounds} rounds counted", outcome)
    return outcome


# --- beyond the letters


@fault("B", "voice", WITHOUT)
def reply_in_the_name_of_nobody(directory: Path) -> Outcome:
    """The metadata in a damaged reply name a node that does not exist."""

    def change(reply: Message) -> None:
        with_values(lambda values: np.full_like(values, np.nan))(reply)
        from_node(node_id(99))(reply)

    return left_out(directory, only([HOSTILE], change))


@fault("B", "voice", "the reply counts for its own node or not at all; no node has two voices")
def reply_in_the_name_of_another(directory: Path) -> Outcome:
    """The metadata in a reply name the node of another client."""
    finished = run(directory, ALL, answer=only([HOSTILE], from_node(node_id(HONEST[0]))))
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "counted for its own node"
    return same_result(happened, finished, undisturbed(HONEST if reasons else ALL))


@fault("B", "round", "that round fails, and the run goes on")
def error_inside_a_round(directory: Path) -> Outcome:
    """The server's average raises ZeroDivisionError in the second round."""
    from flower_adapter import StreamingFedAvg

    aggregate = StreamingFedAvg.aggregate_train

    def failing(self: Any, server_round: int, replies: Any) -> Any:
        if server_round == 2:
            raise ZeroDivisionError("for this test")
        return aggregate(self, server_round, replies)

    with mock.patch.object(StreamingFedAvg, "aggregate_train", failing):
        finished = run(directory)
    reference = undisturbed()
    completed(finished, reference)
    outcome = compared("the second round failed, the others counted", finished, reference)
    expect(finished.rounds == ROUNDS - 1, f"{finished.rounds} rounds counted", outcome)
    expect("for this test" in finished.log, "the log does not name the error", outcome)
    return outcome


@fault("B", "all", "all eight are left out, and the five others get the weights of a run alone")
def eight_of_thirteen_each_in_another_way(directory: Path) -> Outcome:
    """Eight of thirteen clients misbehave at once, each in another way."""
    changes = [
        with_header(b"(" * 3000 + b"\n"),
        with_array(shape=(16_000, 16_000)),
        with_body("MetricRecord", b"\xff\xff\xff"),
        with_values(lambda values: np.full_like(values, np.inf)),
        with_metrics(num_examples=1e300),
        with_metrics(num_examples=5e-324),
        with_metrics(num_examples=0.5),
        with_values(lambda values: values + 1e6),
    ]
    hostile = range(5, 13)

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Any:
        if number not in hostile:
            return reply
        return only([number], changes[number - 5])(grid, number, message, reply)

    return left_out(directory, answer, numbers=range(13), hostile=hostile, of=13)
