import re
from dataclasses import FrozenInstanceError
from statistics import median_high, median_low
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from grids import BAD_REPLIES, GLOBAL, good, moved, record, with_arrays, with_metrics, without
from hypothesis import given
from hypothesis import strategies as st

from flower_adapter import Guard
from flower_adapter.server.guard import Update, scale_update, update_norm

SENT = record(**GLOBAL)


def check(reply: RecordDict, weight_key: str = "num-examples") -> float:
    return Guard().check(reply, weight_key, SENT).norm


def left_out(*norms: float, **settings: Any) -> set[int]:
    return set(Guard(**settings).outliers([Update(norm, 0.0) for norm in norms]))


def changed(*changes: float) -> dict[int, str]:
    """Return the reason for each reply that is left out because of its integers."""
    return Guard().outliers([Update(1.0, change) for change in changes])


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_train_reply_is_refused_with_the_reason(kind: str) -> None:
    reply, reason = BAD_REPLIES[kind]
    with pytest.raises(ValueError, match=re.escape(reason)):
        check(reply)


def test_every_fault_of_the_arrays_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^n is missing; w is float64 \(1,\), .*; x should not be there$"
    ):
        check(RecordDict({**good(), "arrays": record(w=np.zeros(1), x=np.ones(1))}))


def test_the_norm_of_an_update_is_that_of_numpy_over_all_floats() -> None:
    chance = np.random.default_rng(1)
    sent = {
        "a": chance.normal(size=(3, 4)).astype(np.float32),
        "b": chance.normal(size=5),
        "c": (chance.normal(size=2) + 1j * chance.normal(size=2)).astype(np.complex64),
        "n": np.array(3),
        "on": np.array([True, False]),
    }
    trained = {name: array + np.asarray(2, array.dtype) for name, array in sent.items()}
    trained["a"] = np.asfortranarray(trained["a"])
    trained["on"] = np.array([True, True])
    changes = [(trained[name] - sent[name]).ravel() for name in "abc"]
    reply = RecordDict({**good(), "arrays": record(**trained)})
    norm = Guard().check(reply, "num-examples", record(**sent)).norm
    assert norm == pytest.approx(np.linalg.norm(np.concatenate(changes)), rel=1e-6)


def test_an_update_too_long_for_a_square_in_single_precision_has_its_norm() -> None:
    assert check(moved(3e30)) == pytest.approx(3e30, rel=1e-6)


def test_an_update_whose_difference_overflows_its_dtype_has_its_norm() -> None:
    sent = record(w=np.array([-60_000, 0], np.float16), n=np.array(3))
    reply = with_arrays(w=np.array([60_000, 0], np.float16))
    norm = Guard().check(reply, "num-examples", sent).norm
    assert norm == pytest.approx(120_000, rel=1e-3)


def test_an_update_longer_than_any_float_is_refused_with_its_norm() -> None:
    sent = record(w=np.full(2, -1.7e308), n=np.array(3))
    with pytest.raises(ValueError, match="its update has norm inf, should be finite"):
        Guard().check(with_arrays(w=np.full(2, 1.7e308)), "num-examples", sent)


def test_the_weight_is_the_one_under_the_strategys_key() -> None:
    tokens = with_metrics(tokens=5)
    assert check(tokens, "tokens") == check(good()) == pytest.approx(np.sqrt(2))
    with pytest.raises(ValueError, match="tokens is missing"):
        check(good(), "tokens")


@pytest.mark.parametrize(
    "kind", ["no metrics", "no weight", "weight zero", "metric nan", "metric list with inf"]
)
def test_a_bad_evaluate_reply_is_refused_with_the_reason(kind: str) -> None:
    reply, reason = BAD_REPLIES[kind]
    without_arrays = RecordDict({k: r for k, r in reply.items() if k != "arrays"})
    with pytest.raises(ValueError, match=re.escape(reason)):
        Guard().check(without_arrays, "num-examples", None)


def test_an_evaluate_reply_needs_no_arrays_and_has_norm_zero() -> None:
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    assert Guard().check(RecordDict({"metrics": metrics}), "num-examples", None) == (0.0, 0.0)


def test_an_evaluate_reply_with_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 1 ArrayRecords, should hold none"):
        Guard().check(good(), "num-examples", None)


def test_a_check_does_not_change_the_reply() -> None:
    reply, same = good(), good()
    check(reply)
    assert reply == same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_replies": 0}, "min_replies is 0, should be a whole number of at least 1"),
        ({"min_replies": -1}, "min_replies is -1"),
        ({"min_replies": 1.5}, "min_replies is 1.5"),
        ({"min_replies": True}, "min_replies is True"),
        (
            {"max_failed_rounds": 0},
            "max_failed_rounds is 0, should be a whole number of at least 1",
        ),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio is 1.0, should be above 1, or None"),
        ({"max_norm_ratio": float("nan")}, "max_norm_ratio is nan"),
    ],
)
def test_a_guard_needs_sensible_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**arguments)


def test_a_guard_is_its_settings_and_nothing_else() -> None:
    guard = Guard(min_replies=2)
    guard.outliers([Update(norm, 0.0) for norm in (1.0, 1.0, 1e6)])
    with pytest.raises(ValueError, match="holds 0"):
        guard.check(without("metrics"), "tokens", SENT)
    assert guard == Guard(min_replies=2)
    with pytest.raises(FrozenInstanceError):
        guard.min_replies = 1  # type: ignore[misc]


@pytest.mark.parametrize("place", range(7))
def test_an_update_a_thousand_times_the_others_is_an_outlier_wherever_it_stands(
    place: int,
) -> None:
    norms = [1.0] * 7
    norms[place] = 1000.0
    assert Guard().outliers([Update(norm, 0.0) for norm in norms]) == {
        place: "its update has norm 1000, should be at most 100 times 1, the median of the others"
    }


@pytest.mark.parametrize("norms", [(1.0, 1000.0), (1e-3, 1.0), (0.0, 1.0)])
def test_of_two_updates_none_is_an_outlier(norms: tuple[float, ...]) -> None:
    assert left_out(*norms) == set()


@pytest.mark.parametrize("odd", [1e-3, 0.0, 1e3])
@pytest.mark.parametrize("count", [3, 5, 10])
def test_one_odd_client_never_costs_another_its_place(count: int, odd: float) -> None:
    assert left_out(odd, *[1.0] * (count - 1)) == ({0} if odd > 1 else set())


@pytest.mark.parametrize("norms", [(1.0, 10.0), (1.0, 1.0, 10.0), (10.0, 1.0, 3.0, 0.1, 1.0)])
def test_honest_updates_of_ten_times_the_norm_stay(norms: tuple[float, ...]) -> None:
    assert left_out(*norms) == set()


def test_the_limit_is_the_ratio_and_none_lets_every_norm_pass() -> None:
    norms = (1.0, 1.0, 50.0, 1e6)
    assert left_out(*norms, max_norm_ratio=None) == set()
    assert left_out(*norms, max_norm_ratio=1e7) == set()
    assert left_out(*norms) == {3}
    assert left_out(*norms, max_norm_ratio=49.0) == {2, 3}
    assert left_out(*norms, max_norm_ratio=50.0) == {3}


def test_clients_that_did_not_move_are_not_counted_in_the_median() -> None:
    assert left_out(0.0, 0.0, 1.0) == set()
    assert left_out(1e6, *[0.0] * 6, 1.0, 1.0, 1.0) == {0}


def test_a_client_alone_may_move_by_any_length() -> None:
    assert left_out(1e9) == set()
    assert left_out() == set()


def test_updates_near_the_largest_floats_are_compared_too() -> None:
    assert left_out(1.0, 1.0, 3e30) == {2}
    assert left_out(1e30, 1e30, 3e30) == set()


@pytest.mark.parametrize("places", [(0, 1, 2), (47, 48, 49), (24, 25, 26), (0, 25, 49)])
def test_three_of_fifty_far_too_long_updates_are_outliers_and_no_other_is(
    places: tuple[int, ...],
) -> None:
    norms = np.random.default_rng(0).uniform(0.5, 2.0, 50)
    norms[list(places)] *= 1e6
    assert left_out(*norms) == set(places)


@given(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 1e3, 1e6]), max_size=9))
def test_each_norm_is_compared_with_the_median_of_the_others(norms: list[float]) -> None:
    expected = set()
    for index, norm in enumerate(norms):
        others = [other for k, other in enumerate(norms) if k != index and other > 0]
        if len(others) >= 2 and norm > 100 * median_high(others):
            expected.add(index)
    assert left_out(*norms) == expected


@pytest.mark.parametrize("place", range(5))
def test_a_weight_far_above_the_median_is_reduced_to_ten_times_the_median(place: int) -> None:
    weights: list[float] = [1000] * 5
    weights[place] = 10**7
    expected = [1000] * 5
    expected[place] = 10_000
    assert Guard().weights(weights) == expected


def test_of_two_weights_the_lower_one_is_the_median_and_none_lets_every_weight_pass() -> None:
    assert Guard().weights([1, 10**9]) == [1, 10]
    assert Guard().weights([10**9]) == [10**9]
    assert Guard().weights([]) == []
    assert Guard().weights([3.0, 2.0**40]) == [3.0, 30.0]
    assert Guard(max_weight_ratio=None).weights([1, 1, 10**9]) == [1, 1, 10**9]
    assert Guard(max_weight_ratio=2.5).weights([3, 3, 9]) == [3, 3, 7]


@given(st.lists(st.integers(1, 2**53), min_size=1, max_size=9))
def test_no_weight_counts_more_than_ten_times_the_lower_median(weights: list[int]) -> None:
    counts = Guard().weights(weights)
    bound = 10 * median_low(weights)
    assert counts == [min(weight, bound) for weight in weights]
    assert all(type(count) is int for count in counts)


def test_an_update_above_three_times_the_median_is_scaled_down_to_it() -> None:
    assert Guard().scales([1.0, 1.0, 4.0]) == [1.0, 1.0, 0.75]
    assert Guard().scales([1.0, 1.0, 3.0]) == [1.0] * 3
    assert Guard().scales([1.0, 1.0, 6.0, 6.0]) == [1.0, 1.0, 0.5, 0.5]
    assert Guard(clip_norm_ratio=None).scales([1.0, 1.0, 99.0]) == [1.0] * 3


def test_scaling_needs_three_updates_that_moved() -> None:
    assert Guard().scales([1.0, 50.0]) == [1.0, 1.0]
    assert Guard().scales([0.0, 1.0, 50.0]) == [1.0] * 3
    assert Guard().scales([0.0, 1.0, 1.0, 50.0]) == [1.0, 1.0, 1.0, 3 / 50]


def test_a_scaled_update_has_exactly_its_new_length_and_the_same_direction() -> None:
    chance = np.random.default_rng(1)
    sent = record(
        w=chance.normal(size=(3, 4)).astype(np.float32),
        c=np.array([1 + 1j], np.complex64),
        n=np.array(3),
    )
    arrays = record(
        w=chance.normal(size=(3, 4)).astype(np.float32),
        c=np.array([2 - 3j], np.complex64),
        n=np.array(9),
    )
    before = {name: arrays[name].numpy() - sent[name].numpy() for name in sent}
    norm = update_norm(arrays, sent)
    scale_update(arrays, sent, 0.25)
    assert update_norm(arrays, sent) == pytest.approx(norm / 4, rel=1e-5)
    for name in ("w", "c"):
        moved = arrays[name].numpy() - sent[name].numpy()
        np.testing.assert_allclose(moved, before[name] / 4, rtol=1e-4, atol=1e-6)
    assert arrays["n"].numpy() == 9


def test_a_far_too_large_change_of_an_integer_is_an_outlier() -> None:
    assert changed(50, 50, 5000, 40) == {}
    assert changed(50, 50, 5001, 40) == {
        2: "an integer has changed by 5001, should be at most 100 times 50, the median of the "
        "others"
    }
    assert set(changed(0, 0, 2**53)) == {2}  # nobody else has changed an integer
    assert changed(0, 0, 100) == {}
    assert changed(0, 2**53) == {}  # two replies cannot show which one is wrong


def test_the_largest_change_of_an_integer_is_measured() -> None:
    reply = with_arrays(n=np.array(-7))
    assert Guard().check(reply, "num-examples", SENT).integer_change == 10
    unsigned = record(w=np.zeros(2, np.float32), n=np.array([5, 2**40], np.uint64))
    reply = with_arrays(n=np.array([0, 2**40 + 9], np.uint64))
    assert Guard().check(reply, "num-examples", unsigned).integer_change == 9


LOSS, MORE = {"num-examples": 1, "loss": 0.5}, {"num-examples": 1, "loss": 0.5, "x": 1.0}


def strangers(*metrics: dict[str, Any], usual: dict[str, Any] | None = None) -> dict[int, str]:
    return Guard().strangers(metrics, [["arrays", "metrics"]] * len(metrics), usual)


def test_the_metrics_of_most_replies_count_and_the_difference_is_named() -> None:
    renamed = {"num-examples": 1, "lost": 0.5}
    listed = {"num-examples": 1, "loss": [0.5, 0.5]}
    assert strangers(renamed, LOSS, listed, LOSS, MORE) == {
        0: "differs from most replies: lacks the metric loss, has the metric lost",
        2: "differs from most replies: has a list of 2 for the metric loss, not a number",
        4: "differs from most replies: has the metric x",
    }


def test_in_a_tie_the_metrics_of_the_last_round_count_else_those_of_the_first_label() -> None:
    assert set(strangers(LOSS, MORE)) == {1}
    assert set(strangers(LOSS, MORE, usual=LOSS)) == {1}
    assert set(strangers(LOSS, MORE, usual=MORE)) == {0}
    assert set(strangers(MORE, LOSS, usual={"num-examples": 1})) == {1}
    assert set(strangers(LOSS, LOSS, MORE, usual=MORE)) == {2}
    assert strangers(usual=LOSS) == {}


def test_a_record_with_another_name_than_those_of_most_replies_is_named() -> None:
    names = [["arrays", "metrics"], ["arrays", "m"], ["arrays", "metrics"]]
    assert Guard().strangers([LOSS] * 3, names, None) == {
        1: "differs from most replies: lacks the record metrics, has the record m"
    }
    pretending = {**LOSS, "arrays": 1.0}
    assert set(Guard().strangers([LOSS, pretending, LOSS], [["arrays"], [], ["arrays"]], None)) == {
        1
    }


@given(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 1e3, 1e6]), max_size=9), st.randoms())
def test_the_order_of_the_norms_does_not_matter(norms: list[float], chance: Any) -> None:
    order = list(range(len(norms)))
    chance.shuffle(order)
    shuffled = left_out(*(norms[index] for index in order))
    assert {order[index] for index in shuffled} == left_out(*norms)


def test_a_round_with_too_few_good_replies_has_failed() -> None:
    guard = Guard(min_replies=3)
    assert guard.shortage(2, 4) == "2 good of 4 replies, needs 3"
    assert guard.shortage(3, 4) is None
    assert guard.shortage(0, 0) is None  # nobody was asked


def test_integers_may_be_as_large_as_doubles_count_exactly() -> None:
    assert check(with_arrays(n=np.array(2**53))) == check(with_arrays(n=np.array(-(2**53)))) == 0.0
