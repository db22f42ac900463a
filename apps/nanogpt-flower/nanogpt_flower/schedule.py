"""The learning rate of each step of a client, over all rounds of a run."""

from gpt_core import learning_rate_at
from nanogpt_flower.settings import Settings


def learning_rate(settings: Settings, steps: int, server_round: int, step: int, own: int) -> float:
    """Return the learning rate of one optimizer step.

    The schedule follows the rounds of the run. So all clients of a round have the same rate, even
    if one of them was not in all earlier rounds. The warm-up follows the steps that the client has
    made, because its optimizer needs some gradients before its updates can be trusted.

    Args:
        settings: the settings of the run.
        steps: number of steps of the client in a round.
        server_round: number of the round, counted from 1.
        step: number of the step in the round, counted from 1.
        own: number of steps that the client has made in the run, with this one.
    """
    rate = learning_rate_at(
        (server_round - 1) * steps + step,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        total_steps=schedule_rounds(settings) * steps,
        floor=settings.min_learning_rate,
    )
    return rate * min(1.0, own / max(1, settings.warmup_steps))


def schedule_rounds(settings: Settings) -> int:
    """Return the number of rounds after which the schedule has reached its end."""
    return settings.schedule_rounds or settings.num_server_rounds


def smallest_learning_rate_sum(settings: Settings, steps: int, server_round: int) -> float:
    """Return the sum of the learning rates in a round, for the round in which it is smallest.

    That is the first round, which has the warm-up, the last round of the schedule, or
    `server_round` if the run is longer than its schedule.
    """
    return min(
        sum(
            learning_rate(settings, steps, at, step, (at - 1) * steps + step)
            for step in range(1, steps + 1)
        )
        for at in {1, schedule_rounds(settings), server_round}
    )


def describe_schedule(settings: Settings) -> str:
    """Describe the course of the learning rate in one line."""
    if settings.schedule == "constant":
        return f"{settings.learning_rate:g} in all rounds"
    return (
        f"{settings.schedule} from {settings.learning_rate:g} to {settings.min_learning_rate:g} "
        f"over rounds 1 to {schedule_rounds(settings)}"
    )


def schedule_notes(settings: Settings) -> list[str]:
    """Describe what a user should know of the schedule of a resumed run."""
    if settings.schedule == "constant" or not settings.resume_from:
        return []
    rounds = schedule_rounds(settings)
    note = f"the learning rate goes on with its schedule: {describe_schedule(settings)}"
    if rounds < settings.num_server_rounds:
        note += f"; after round {rounds} it stays at {settings.min_learning_rate:g}"
    return [note]
