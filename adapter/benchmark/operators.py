"""Where the time goes: seconds of each operator until the first token, and of a decode step, on one rank."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

STEPS = 8  # decode steps that a step's figures are the mean of
MOST = 10  # operators that are told by name


def operators(run: Callable[[int], object]) -> dict[str, dict[str, float]]:
    """run(n): a request of n new tokens. Two of them, their difference some steps: so the prompt's part and a step's
    are told apart. CPU seconds by themselves, the largest first; `all others` is their rest."""
    short, long = _told(run, 2), _told(run, 2 + STEPS)
    step = {}
    for name, (took, calls) in long.items():
        took_of_two, calls_of_two = short.get(name, (0.0, 0))
        # called as often for two tokens as for more, it is the prompt's alone, and the difference is noise
        step[name] = max(0.0, (took - took_of_two) / STEPS) if calls > calls_of_two else 0.0
    first = {name: max(0.0, took - step.get(name, 0.0)) for name, (took, _) in short.items()}
    return {"first_token_s": _largest(first), "step_s": _largest(step)}


def _told(run: Callable[[int], object], new: int) -> dict[str, tuple[float, int]]:
    """Operator -> its own CPU seconds, and how often it was called."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run(new)
    return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in found.key_averages()}


def _largest(seconds: dict[str, float]) -> dict[str, float]:
    names = sorted(seconds, key=lambda name: -seconds[name])
    told = {name: round(seconds[name], 5) for name in names[:MOST]}
    return {**told, "all others": round(sum(seconds[name] for name in names[MOST:]), 5)}
