"""Each check of the doctor with the cause it is there for planted, and without it."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import ROOT

from adapter.config.load import load_config
from adapter.doctor import check, host, job, main, probe
from adapter.doctor.check import FAILED, OK, WARNING, Case, Trial
from adapter.kernels import build

DEMO = load_config(ROOT / "configs" / "demo_tp4.yaml")


def judged(one, case: Case):
    """(status, what was found, what to do) as the report has it."""
    row = next(check.run([one], case))
    assert row.status == OK or row.do, "a failure says what to do"
    assert "itself broke" not in row.found
    return row.status, row.found, row.do


# This machine, and what is installed


def test_releases_out_of_range_and_missing(monkeypatch):
    assert judged(host.packages, Case({}))[0] == OK
    monkeypatch.setattr(host, "requirements", lambda: ["numpy>=99", "no-such-package-here>=1"])
    status, found, do = judged(host.packages, Case({}))
    assert status == FAILED and "numpy>=99" in found and "none is installed" in found and "no-such-package-here" in do


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(package, source): a package that hides the real one in child processes."""
    def make(package: str, source: str) -> None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return make


@pytest.mark.parametrize("source, words", [
    ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
    ("raise SystemExit(0)", "SystemExit"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
    ("import time; time.sleep(60)", "no end after"),
])
def test_a_package_that_breaks_on_import_is_told_and_the_next_is_asked(stub, source, words):
    stub("av", source)
    began = time.monotonic()
    case = Case({}, packages=main.probe(["av", "json"], limit_s=2 if "sleep" in source else 30))
    status, found, do = judged(host.imports, case)
    assert status == FAILED and f"import av: {words}" in found and "av" in do
    assert "sleep" in source or "facts" in case.packages["json"]
    assert time.monotonic() - began < 20


def test_a_torchvision_of_another_torch_is_told_of_the_pair():
    error = "RuntimeError: operator torchvision::nms does not exist"
    assert "pair" in judged(host.imports, Case({}, packages={"torchvision": {"error": error}}))[2]


def test_what_imports_is_ok(stub):
    stub("av", "__version__ = '1'")
    packages = main.probe(["av", "packaging"])
    assert judged(host.imports, Case({}, packages=packages))[0] == OK and packages.keys() == {"av", "packaging"}


def building(**facts) -> Case:
    """What DeepSpeed's probe says of a machine where everything can be built, but for the facts."""
    whole = {"accelerator": "cpu", "missing_tools": [], "build_root": "/tmp", "waits_for_lock_files": True}
    return Case({}, packages={"deepspeed": {"facts": whole | facts}})


def test_no_ninja_no_compiler(tmp_path, monkeypatch):
    """The start's own question, and what the doctor says of its answer."""
    assert not build.missing_tools() and judged(host.compiler, building())[0] == OK
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.missing_tools() == ["no-such-compiler"]
    monkeypatch.setenv("PATH", str(tmp_path))
    status, found, do = judged(host.compiler, building(missing_tools=build.missing_tools()))
    assert status == WARNING and "ninja and no-such-compiler not on PATH" in found
    assert "pip install ninja" in do and "apt install g++" in do
    assert "ninja" not in judged(host.compiler, building(missing_tools=["c++"]))[2]
    assert host.compiler(Case({})) is None, "where DeepSpeed is broken, the row imports says so"


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(host.sysconfig, "get_path", lambda name: str(tmp_path))
    status, found, do = judged(host.compiler, building())
    assert status == FAILED and "Python.h" in found and "python3-dev" in do


def test_extensions_cache_that_cannot_be_written(tmp_path):
    assert judged(host.extensions_cache, building(build_root=str(tmp_path / "new")))[0] == OK
    (tmp_path / "file").touch()
    status, found, do = judged(host.extensions_cache, building(build_root=str(tmp_path / "file" / "new")))
    assert status == FAILED and "cannot be written" in found and "TORCH_EXTENSIONS_DIR" in do
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_extensions_cache_on_a_file_system_without_execution(monkeypatch, tmp_path):
    monkeypatch.setattr(host.os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert "noexec" in judged(host.extensions_cache, building(build_root=str(tmp_path)))[1]


def test_lock_file_that_a_killed_job_left(tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert judged(host.extensions_cache, building(build_root=str(tmp_path)))[0] == OK, "a job may be compiling"
    os.utime(lock, (0, time.time() - 600))
    status, found, do = judged(host.extensions_cache, building(build_root=str(tmp_path)))
    assert status == FAILED and str(lock) in found and do.endswith(f"rm {lock}")
    through_the_kernel = building(build_root=str(tmp_path), waits_for_lock_files=False)
    assert judged(host.extensions_cache, through_the_kernel)[0] == OK, "the kernel frees the lock of a killed process"


def test_which_torch_waits_for_lock_files(monkeypatch):
    """And where it builds, by torch's own answer."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/x")
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    facts = probe.ANSWERS["deepspeed"]()
    assert facts["waits_for_lock_files"] and facts["build_root"] == "/x"
    monkeypatch.delattr(cpp_extension, "FileBaton")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    facts = probe.ANSWERS["deepspeed"]()
    assert not facts["waits_for_lock_files"] and facts["build_root"] == cpp_extension.get_default_build_root()


def test_shared_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: (64 << 20, 0, 64 << 20))
    status, found, do = judged(host.dev_shm, Case({}, ranks=1))
    assert status == FAILED and "67 MB free" in found and "--shm-size" in do
    assert judged(host.dev_shm, Case({}, ranks=2, packages=on("cuda")))[0] == OK, "NCCL says itself what it lacks"
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: (1 << 30, 0, 1 << 30))
    assert judged(host.dev_shm, Case({}, ranks=4))[0] == OK
    assert judged(host.dev_shm, Case({}, ranks=16))[0] == FAILED


def test_segments_of_killed_jobs():
    file = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_doctor_{os.getpid()}_0")
    try:
        file.write_bytes(b"x")
        assert str(file) not in judged(host.dev_shm, Case({}))[2], "a job may be about to map it"
        os.utime(file, (0, time.time() - 120))
        status, _, do = judged(host.dev_shm, Case({}))
        assert status == WARNING and str(file) in do.split()
        import mmap

        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 1, access=mmap.ACCESS_READ):
            assert str(file) not in judged(host.dev_shm, Case({}))[2].split(), "a living process has it"
    finally:
        file.unlink()
    assert str(file) not in judged(host.dev_shm, Case({}))[2]


def on(accelerator: str, **torch):
    return {"deepspeed": {"facts": {"accelerator": accelerator}},
            "torch": {"facts": {"torch_version": "2.9", "cuda_compiled_version": "13.0", "is_cuda_available": "True",
                                **torch}}}


@pytest.mark.parametrize("torch, status, words", [
    ({"cuda_compiled_version": None, "is_cuda_available": "False"}, WARNING, "build without CUDA"),
    ({"is_cuda_available": "False"}, FAILED, "can use none: driver unknown"),
    ({}, OK, "1 NVIDIA devices here"),
])
def test_gpus(tmp_path, torch, status, words):
    """With device files and torch's answers as a machine with GPUs would have them."""
    (tmp_path / "nvidia0").touch()
    row = host.gpu(Case({}, packages=on("cuda", **torch)), tmp_path)
    assert row.status == status and words in row.found


def test_no_gpu_is_nothing_to_say(tmp_path):
    assert host.gpu(Case({}, packages=on("cpu")), tmp_path) is None


# A job's config and its environment


def test_plan_of_a_checkpoint_that_is_not_whole(tmp_path):
    assert judged(host.plan, Case({}, config=DEMO))[0] == OK
    model = Path(shutil.copytree(DEMO.model.path, tmp_path / "model"))
    os.truncate(model / "model.safetensors", 1_000_000)
    broken = DEMO.model_copy(update={"model": DEMO.model.model_copy(update={"path": model})})
    status, found, do = judged(host.plan, Case({}, config=broken))
    assert status == FAILED and "model.safetensors" in found and "python -m adapter plan --config C" in do
    (model / "model.safetensors").unlink()
    assert "no safetensors file" in judged(host.plan, Case({}, config=broken))[1]


@pytest.mark.parametrize("available, status", [(1_000_000_000, FAILED), (3_000_000_000, WARNING), (9_000_000_000, OK)])
def test_memory_for_the_shards(monkeypatch, available, status):
    monkeypatch.setattr(host, "available_memory", lambda: available)
    judgement = judged(host.plan, Case({}, ranks=4, config=DEMO))
    assert judgement[0] == status and "4 ranks here" in judgement[1] and "2.8 GB" in judgement[1], judgement
    assert judged(host.plan, Case({}, ranks=4, config=DEMO, packages=on("cuda")))[0] == OK, "a full GPU says so itself"


@pytest.mark.parametrize("ranks, omp, status", [
    (2, None, WARNING), (2, "2", WARNING), (2, "many", WARNING), (2, "1", OK), (3, "1", WARNING), (1, None, OK),
])
def test_ranks_and_threads_against_cores(monkeypatch, ranks, omp, status):
    monkeypatch.setattr(job, "usable_cores", lambda: 2)
    judgement = judged(job.threads, Case({"OMP_NUM_THREADS": omp} if omp else {}, ranks))
    assert judgement[0] == status and (status == OK or "export OMP_NUM_THREADS=1" in judgement[2])
    assert ("busy-waits" in judgement[1]) is (ranks > 2)


# What ranks reported


def rank(number: int, **more):
    return {"rank": number, "host": socket.gethostname(), "cores": [0, 1], "threads": 1,
            "summing": "torch group; not DeepSpeed's shared-memory op: no compiler", "wrong_sums": [], **more}


def reported(*rows):
    return Case({}, trial=Trial(0, "exit code 0", ranks=rows))


def ended(**more):
    return judged(job.rendezvous, Case({}, trial=Trial(**{"code": 1, "how": "exit code 1", **more})))


@pytest.mark.parametrize("one, second, status, words", [
    (job.all_reduce, {"wrong_sums": ["3000 bytes of bfloat16"]}, FAILED, "rank 1: 3000"),
    (job.all_reduce, {}, OK, "torch group; not DeepSpeed's shared-memory op: no compiler; right in float32"),
    (job.rendezvous, {"host": "another"}, OK, "2 ranks on another, "),
    (job.threads, {"threads": 2}, WARNING, "up to 3 threads on 2 usable cores, which take turns"),
    (job.threads, {"host": "another", "threads": 2}, OK, "1 rank on this host"),
])
def test_what_ranks_reported(monkeypatch, one, second, status, words):
    monkeypatch.setattr(job, "cpu_quota", lambda: None)
    judgement = judged(one, reported(rank(0), rank(1, **second)))
    assert judgement[0] == status and words in judgement[1]
    assert judged(one, reported(rank(0), rank(1)))[0] == OK


def test_ranks_bound_to_one_core():
    status, found, do = judged(job.threads, reported(rank(0, cores=[0]), rank(1, cores=[0])))
    assert status == WARNING and "2 ranks on this host, up to 2 threads on 1 usable cores" in found
    assert "mpirun --bind-to none" in do
    assert judged(job.threads, reported(rank(0, cores=[0]), rank(1, cores=[1])))[0] == OK


def test_ranks_that_did_not_join():
    status, found, do = ended(code=None, how="no end after 9 s", steps={0: "join", 1: "import"})
    assert status == FAILED and "rank 0 was joining the job; rank 1 was importing" in found and "firewall" in do
    status, _, do = ended(code=-11, how="died of SIGSEGV", steps={0: "sum"}, ranks=(rank(0),))
    assert status == FAILED and "CXX=none" in do


def test_what_a_rank_says_is_the_finding():
    status, found, do = ended(errors={0: "RuntimeError: [enforce fail] Unable to find address for: nosuch0"})
    assert status == FAILED and "rank 0: RuntimeError" in found and "GLOO_SOCKET_IFNAME must name one of" in do
    status, found, do = ended(errors={1: "UserError: port 29500 cannot be used; start with another"}, steps={1: "join"})
    assert status == FAILED and "port 29500" in found and do == "as the message says"
