import io

from rich.console import Console

from tppo.progress import RECENT_STEPS, TimeLeft, as_duration, progress_bar


def test_time_left_is_the_recent_mean_times_the_steps_left():
    left = TimeLeft(10.0)
    assert left.seconds(5) is None
    left.step_ended(14.0)  # 4 s
    assert left.seconds(5) == 20.0
    left.step_ended(16.0)  # mean of 4 and 2
    assert left.seconds(5) == 15.0
    assert left.seconds(0) == 0.0


def test_old_steps_are_forgotten():
    left = TimeLeft(0.0)
    left.step_ended(1000.0)
    for step in range(1, RECENT_STEPS + 1):
        left.step_ended(1000.0 + 2 * step)
    assert left.seconds(3) == 6.0


def test_durations_read_as_hours_minutes_and_seconds():
    assert [as_duration(s) for s in (None, 0, 59.6, 3700, 200_000)] == [
        "-",
        "0:00:00",
        "0:01:00",
        "1:01:40",
        "55:33:20",
    ]


def test_the_bar_shows_accuracy_reward_rate_and_time_left():
    times = iter([0.0, 30.0])
    console = Console(width=150, file=io.StringIO(), force_terminal=True)
    with progress_bar(
        True, "mine", total_steps=10, done_steps=4, clock=lambda: next(times), console=console
    ) as advance:
        advance(5, 0.625, {"critic/rewards/mean": 0.5, "perf/throughput": 12345.6})
    text = console.file.getvalue()
    for part in ("mine", "5/10", "accuracy 0.62", "reward 0.50", "12,346 tokens/s", "left 0:02:30"):
        assert part in text
