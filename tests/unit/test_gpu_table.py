"""The table of tests/gpu.sh: every job is a line whatever it raises, and a failed one is the exit code."""

from __future__ import annotations

import gpu
import pytest

CPU = gpu.Machine(2, "cpu", "2 x CPU ranks", ("float32", "bfloat16"))


def test_each_way_a_job_may_end_is_a_line(capsys):
    def raising(error: Exception):
        def job() -> str:
            raise error
        return job

    ends = (lambda: "fine", raising(gpu.DoesNotApply("no card")), raising(gpu.Failed("exit code 1")),
            raising(KeyError("x|y")))
    lines = [gpu.outcome_of("a job", 2, end) for end in ends]
    assert [line.result for line in lines] == ["passed", "does not apply", "FAILED", "FAILED"]
    assert [gpu.exit_code(lines[:2]), gpu.exit_code(lines[:3]), gpu.exit_code(lines[3:])] == [0, 1, 1]
    rows = gpu.table(CPU, lines).splitlines()
    assert CPU.name in rows[0] and rows[2].count("|") == 6 == rows[-1].count("|")
    assert "KeyError: 'x/y'" in rows[-1] and rows[-4] in capsys.readouterr().err


def test_the_jobs_of_a_cpu_say_why_they_do_not_apply():
    names = {name: (ranks, call) for name, ranks, call in gpu.jobs(CPU, "requests=[]")}
    assert [ranks for name, (ranks, _) in names.items() if name.startswith("parity")] == [1, 2]
    assert {"replicas", "graphs against no graphs", "a killed rank", "bench against Transformers"} < names.keys()
    for name, why in (("flash_attention_2", "for GPUs"), ("verify in float16", "computes in float32, bfloat16")):
        with pytest.raises(gpu.DoesNotApply, match=why):
            names[name][1]()
    alone = gpu.Machine(1, "cpu", "1", ("float32",))
    for call in (gpu.replicas, gpu.killed_rank):
        with pytest.raises(gpu.DoesNotApply, match="one rank"):
            call(alone, "requests=[]")
