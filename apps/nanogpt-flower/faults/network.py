"""Group network: real SuperLinks and SuperNodes on this machine, whose processes and links fail.

The reference is the undisturbed run over the wire of one process. It trains on the same text with
the same secrets, so its weights must be the same.
"""

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.matrix import Outcome, expect, fault
from faults.processes import Deployment
from faults.proxy import Link
from faults.runs import HONEST, Finished, compared, same_result, undisturbed

PAIR = HONEST[:2]
LAST = HONEST[-1]  # the client that something happens to, in runs of three
ROUNDS = 2
# Without evaluation by clients a round has one message for each client.
SETTINGS: dict[str, Any] = {"fraction_evaluate": 0.0, "num_server_rounds": ROUNDS}
PATIENT, IMPATIENT = 150.0, 40.0  # seconds for which the server waits for replies
HOURS_13 = 13 * 3600.0  # a message lives 12 hours
NOTHING_LOST = "the run completes with the weights of the undisturbed run"
RESUMED = "the run is resumed and ends with the weights of the undisturbed run"


@contextmanager
def deployed(
    directory: Path,
    numbers: Sequence[int] = PAIR,
    timeout: float = PATIENT,
    *,
    database: bool = False,
    **changes: Any,
) -> Iterator[Deployment]:
    """Start a SuperLink, SuperNodes and a run."""
    settings = {**SETTINGS, "round_timeout": timeout, **changes}
    with Deployment(directory, numbers, database=database, **settings) as deployment:
        deployment.start_all()
        deployment.submit()
        yield deployment


def reference(numbers: Sequence[int] = PAIR, **changes: Any) -> Finished:
    """Return the undisturbed run of some clients."""
    return undisturbed(numbers, **{**SETTINGS, **changes})


def ended(deployment: Deployment) -> Finished:
    """Wait for the end of the run. Expect that it has completed."""
    status = deployment.wait_for_end()
    expect(status == "finished:completed", f"the run is {status}: {deployment.log_tail()}")
    return deployment.finished()


def resumed(deployment: Deployment, happened: str) -> Outcome:
    """Resume the run after its first attempt has failed, and expect the undisturbed result."""
    deployment.submit(resume=True)
    numbers = list(deployment.clients)
    return same_result(f"{happened}; resumed", ended(deployment), reference(numbers))


def without_one_reply(deployment: Deployment, numbers: Sequence[int], happened: str) -> Outcome:
    """Expect that the run completes, and that no other client has lost a reply."""
    finished, whole = ended(deployment), reference(numbers)
    outcome = compared(happened, finished, whole)
    averaged, others = finished.averaged(), set(numbers) - {LAST}
    for server_round in range(1, ROUNDS + 1):
        missing = others - averaged.get(server_round, set())
        expect(not missing, f"round {server_round} lost the clients {missing}", outcome)
    reasons = finished.reasons()
    outcome.happened = f"{happened}; {reasons[0] if reasons else 'no reply was lost'}"
    return outcome


@fault("network", "-", NOTHING_LOST)
def nothing_goes_wrong(directory: Path) -> Outcome:
    """Nothing: this is the real deployment of the other faults."""
    with deployed(directory) as deployment:
        return same_result("completed", ended(deployment), reference())


# --- processes


@fault("network", "SuperLink", RESUMED)
def superlink_killed_in_a_round(directory: Path) -> Outcome:
    """The SuperLink, which has a database, is killed in the second round and started again."""
    with deployed(directory, database=True) as deployment:
        restart_superlink(deployment)
        return resumed(deployment, "the SuperNodes came back by themselves")


@fault("network", "SuperLink", RESUMED)
def superlink_without_a_database_killed(directory: Path) -> Outcome:
    """A SuperLink without a database is killed, and all programs are started again."""
    with deployed(directory) as deployment:
        restart_superlink(deployment)
        for number in PAIR:  # they do not know that their node ids are forgotten
            deployment.kill(f"supernode-{number}")
            deployment.start_supernode(number)
        return resumed(deployment, "the SuperNodes were started again")


def restart_superlink(deployment: Deployment) -> None:
    """Kill the SuperLink and its ServerApp in the second round, and start the SuperLink."""
    deployment.wait_for_round(1)
    deployment.wait_for_work(PAIR[0])
    deployment.kill("superlink")
    deployment.kill("run")
    deployment.start_superlink()


@fault("network", "ServerApp", RESUMED)
def serverapp_killed_at_random(directory: Path) -> Outcome:
    """The process of the ServerApp is killed at a random time after the first round."""
    with deployed(directory) as deployment:
        deployment.wait_for_round(1)
        seconds = random.uniform(0.0, 4.0)
        time.sleep(seconds)
        found = deployment.named("superlink", "flwr-serverapp")
        expect(found, "there is no process of the ServerApp")
        deployment.signal(found, signal.SIGKILL)
        status = deployment.wait_for_end()
        expect(status == "finished:failed", f"the run is {status}")
        return resumed(deployment, f"killed {seconds:.1f} s after the first round")


@fault("network", "SuperNode", "the run completes; at most that client's replies are lost")
def supernode_killed_and_restarted(directory: Path) -> Outcome:
    """A SuperNode is killed while it trains in the second round, and started again."""
    with deployed(directory, HONEST, IMPATIENT) as deployment:
        deployment.wait_for_round(1)
        deployment.wait_for_work(LAST)
        deployment.kill(f"supernode-{LAST}")
        deployment.start_supernode(LAST)
        return without_one_reply(deployment, HONEST, "started again")


@fault("network", "SuperNode", "the run completes; only that client's replies are lost")
def supernode_killed_for_good(directory: Path) -> Outcome:
    """A SuperNode is killed while it trains in the second round."""
    with deployed(directory, HONEST, IMPATIENT) as deployment:
        deployment.wait_for_round(1)
        deployment.wait_for_work(LAST)
        deployment.kill(f"supernode-{LAST}")
        return without_one_reply(deployment, HONEST, "gone")


@fault("network", "ClientApp", "the run completes; at most that one reply is lost")
def clientapp_killed(directory: Path) -> Outcome:
    """The process that trains for a SuperNode is killed in the second round."""
    with deployed(directory, HONEST, IMPATIENT) as deployment:
        deployment.wait_for_round(1)
        deployment.wait_for_work(LAST)
        found = deployment.named(f"supernode-{LAST}", "flwr-clientapp")
        deployment.signal(found, signal.SIGKILL)
        return without_one_reply(deployment, HONEST, "killed")


@fault("network", "SuperNode", "it trains in the last round, and no other reply is lost")
def supernode_joins_late(directory: Path) -> Outcome:
    """A third SuperNode is started after the first round."""
    more: dict[str, Any] = {"num_server_rounds": ROUNDS + 2}
    with deployed(directory, HONEST, min_clients=2, **more) as deployment:
        deployment.kill(f"supernode-{LAST}")
        deployment.wait_for_round(1)
        deployment.start_supernode(LAST)
        finished = ended(deployment)
        averaged = finished.averaged()
        first = min((at for at, numbers in averaged.items() if LAST in numbers), default=0)
        happened = f"it trains from round {first} on"
        outcome = compared(happened, finished, reference(HONEST, **more))
        expect(first, "it never trained", outcome)
        complete = all(set(PAIR) <= averaged.get(at, set()) for at in range(1, ROUNDS + 3))
        expect(complete, f"replies of the other two are missing: {averaged}", outcome)
        return outcome


@fault("network", "submitter", NOTHING_LOST)
def terminal_of_the_submitter_closed(directory: Path) -> Outcome:
    """The `flwr run` that started the run is killed in the first round."""
    with deployed(directory) as deployment:
        deployment.wait_for_work(PAIR[0])
        deployment.kill("run")
        deployment.wait(lambda: deployment.events("end"), "the ServerApp has ended")
        return same_result("the run went on", ended(deployment), reference())


# --- time


@fault("network", "clock", "it cannot join, and the others get the weights of a run without it")
def clock_wrong_from_the_start(directory: Path) -> Outcome:
    """The clock of a SuperNode is 13 hours ahead when it wants to join."""
    with clocked(directory, min_clients=2) as deployment:
        deployment.clock_file.touch()
        deployment.start_supernode(LAST, ahead=HOURS_13)
        deployment.submit()
        finished = ended(deployment)
        refused = "401" in deployment.log("superlink")
        happened = "the SuperLink refused it (401)" if refused else "it joined"
        return same_result(happened, finished, reference(PAIR), reference(HONEST))


@fault("network", "clock", "the run completes; only that client's replies are lost")
def clock_jumps_13_hours_ahead(directory: Path) -> Outcome:
    """The clock of a SuperNode jumps 13 hours ahead in a round, and messages live 12 hours."""
    return clock_jumps(directory, HOURS_13)


@fault("network", "clock", "the run completes; only that client's replies are lost")
def clock_jumps_13_hours_back(directory: Path) -> Outcome:
    """The clock of a SuperNode jumps 13 hours back in a round, and messages live 12 hours."""
    return clock_jumps(directory, -HOURS_13)


def clock_jumps(directory: Path, ahead: float) -> Outcome:
    """Let the clock of a SuperNode jump in the second round."""
    with clocked(directory) as deployment:
        deployment.start_supernode(LAST, ahead=ahead)
        deployment.submit()
        deployment.wait_for_round(1)
        deployment.wait_for_work(LAST)
        deployment.clock_file.touch()
        return without_one_reply(deployment, HONEST, f"{ahead / 3600:+.0f} h")


@contextmanager
def clocked(directory: Path, **changes: Any) -> Iterator[Deployment]:
    """Start a SuperLink and all SuperNodes but the last."""
    settings = {**SETTINGS, "round_timeout": IMPATIENT, **changes}
    with Deployment(directory, HONEST, **settings) as deployment:
        deployment.start_superlink()
        for number in PAIR:
            deployment.start_supernode(number)
        yield deployment


@fault("network", "slow", NOTHING_LOST)
def slow_client(directory: Path) -> Outcome:
    """All processes of a SuperNode stand still for 15 s in the second round."""
    with deployed(directory) as deployment:
        deployment.wait_for_round(1)
        deployment.wait_for_work(PAIR[1])
        processes = deployment.tree(f"supernode-{PAIR[1]}")
        deployment.signal(processes, signal.SIGSTOP)
        time.sleep(15.0)
        deployment.signal(processes, signal.SIGCONT)
        return same_result("the others waited", ended(deployment), reference())


# --- links


@contextmanager
def linked(directory: Path) -> Iterator[tuple[Deployment, Link]]:
    """Start a run in which the second SuperNode is behind a link that can be cut."""
    settings = {**SETTINGS, "round_timeout": PATIENT}
    with Deployment(directory, PAIR, **settings) as deployment:
        deployment.start_superlink()
        with Link(deployment.port) as link:
            deployment.start_supernode(PAIR[0])
            deployment.start_supernode(PAIR[1], port=link.port)
            deployment.submit()
            yield deployment, link


@fault("network", "link", NOTHING_LOST)
def link_cut_for_30_seconds(directory: Path) -> Outcome:
    """The link of a SuperNode passes nothing for 30 s in the second round."""
    with linked(directory) as (deployment, link):
        deployment.wait_for_round(1)
        deployment.wait_for_work(PAIR[1])
        link.cut()
        time.sleep(30.0)
        link.restore()
        return same_result(f"{link.passed:,} bytes passed", ended(deployment), reference())


@fault("network", "link", NOTHING_LOST)
def connections_reset(directory: Path) -> Outcome:
    """All connections of a SuperNode are reset five times in the second round."""
    with linked(directory) as (deployment, link):
        deployment.wait_for_round(1)
        for _ in range(5):
            link.reset_after(5_000)
            time.sleep(1.5)
        return same_result(f"{link.resets} resets", ended(deployment), reference())


@fault("network", "stranger", NOTHING_LOST)
def garbage_on_the_port(directory: Path) -> Outcome:
    """A stranger sends random bytes to the SuperLink, and keeps 50 half-open connections."""
    with deployed(directory) as deployment, contextlib.ExitStack() as stack:
        deployment.wait_for_work(PAIR[0])
        for number in range(200):
            probe = socket.create_connection(("127.0.0.1", deployment.port), timeout=5.0)
            head = b"POST /v1/fleet/push-messages HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n"
            with contextlib.suppress(OSError):
                probe.sendall(head if number % 2 else os.urandom(1000))
            if number % 4:
                probe.close()
            else:
                stack.callback(probe.close)
        return same_result("the run went on", ended(deployment), reference())
