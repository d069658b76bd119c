"""`bench --profile`: seconds of each operator until the first token, and in a decode step, on one rank."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

STEPS = 8  # decode steps over which a step's figures are averaged
MOST = 10  # operators that are reported by name


def operators(run: Callable[[int], object]) -> dict[str, dict[str, float]]:
    """CPU seconds of each operator by itself, the largest first, `all others` together.

    run(n) answers a request with n new tokens. Two answers whose lengths differ by STEPS separate the prompt's part
    from a step's. An operator that the longer one calls no more often is the prompt's alone.
    """
    short, long = _profiled(run, 2), _profiled(run, 2 + STEPS)
    step = {}
    for name, (seconds, calls) in long.items():
        seconds_of_two, calls_of_two = short.get(name, (0.0, 0))
        step[name] = max(0.0, (seconds - seconds_of_two) / STEPS) if calls > calls_of_two else 0.0
    first = {name: max(0.0, seconds - step.get(name, 0.0)) for name, (seconds, _) in short.items()}
    return {"first_token_s": _largest(first), "step_s": _largest(step)}


def _profiled(run: Callable[[int], object], new: int) -> dict[str, tuple[float, int]]:
    """Operator -> its own CPU seconds, and how often it was called."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run(new)
    return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in found.key_averages()}


def _largest(seconds: dict[str, float]) -> dict[str, float]:
    names = sorted(seconds, key=lambda name: -seconds[name])
    rest = sum(seconds[name] for name in names[MOST:])
    return {**{name: round(seconds[name], 5) for name in names[:MOST]}, "all others": round(rest, 5)}
