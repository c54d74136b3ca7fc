"""Which answers make a backend healthy or unhealthy, and when it is probed again."""

from __future__ import annotations

import pytest

from health import Answer, Cause, Health

G, R, F = Answer(None, "good"), Answer(Cause.REFUSED, "refused"), Answer(Cause.PROBE_FAILED, "failed")
T, U = Answer(Cause.PROBE_FAILED, "timed out", timed_out=True), Answer(Cause.UNREACHABLE, "unreachable")


@pytest.mark.parametrize(
    ("answers", "healthy"),
    [
        ([], None),
        ([F, F], None),
        ([F, F, G, F, F], True),
        ([F, F, F], False),
        ([F, F, F, G], False),
        ([F, F, F, G, G], True),
        ([R], False),
        ([F, R], False),
        ([G, F], True),
        ([G, F, F], True),
        ([G, F, F, F], False),
        ([G, F, F, G, F, F], True),
        ([G, R], False),
        ([G, F, R], False),
        ([G, R, G], False),
        ([G, R, G, G], True),
        ([G, R, G, F, G], False),
        ([G, R, G, R, G, G], True),
        ([G, F, F, F, G, G, F, F], True),
    ],
)
def test_three_failures_or_one_refusal_make_a_backend_unhealthy_and_two_successes_healthy(
    answers: list[Answer], healthy: bool | None
) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.healthy is healthy
    assert health.why == (answers[-1].why if answers else "not probed yet")


@pytest.mark.parametrize(
    ("answers", "pause"),
    [
        ([], 0.1),
        ([F], 0.1),
        ([F] * 50, 0.1),  # it is starting
        ([F] * 110, 1.0),
        ([F] * 110 + [G], 0.1),
        ([F] * 110 + [G, G], 1.0),
        ([G], 1.0),
        ([G] * 110, 1.0),
        ([G, F], 0.1),
        ([G, F, G], 1.0),
        ([G, R], 0.1),
        ([G] + [R] * 110, 1.0),
    ],
)
def test_backend_is_probed_every_second_and_more_often_in_doubt_and_at_first_while_unhealthy(
    answers: list[Answer], pause: float
) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.pause() == pause


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ([G], None),
        ([G, F], None),
        ([F, F, F], Cause.PROBE_FAILED),
        ([G, T, T, T], Cause.PROBE_FAILED),
        ([G, R], Cause.REFUSED),
        ([R, F], Cause.PROBE_FAILED),
        ([U, U, U], Cause.UNREACHABLE),
        ([F, F, F, R], Cause.REFUSED),
        ([R, G], Cause.REFUSED),
        ([R, G, G], None),
    ],
)
def test_unhealthy_backend_has_a_cause(answers: list[Answer], cause: Cause | None) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.cause == cause


@pytest.mark.parametrize(
    ("answers", "healthy"),
    [
        ([G, T, T, T, T], True),
        ([G, U, U, U], True),
        ([T, T, T], None),
        ([G, F, F, F], False),
        ([G, R], False),
        ([R, T, T, G, G], True),
    ],
)
def test_with_a_full_connection_table_lost_packets_change_nothing(answers: list[Answer], healthy: bool | None) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer, table_full=True)
    assert health.healthy is healthy
