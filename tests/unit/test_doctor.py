"""Each check of the doctor with the cause it is there for planted, and without it."""

from __future__ import annotations

import io
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, free_port

from adapter.config.load import load_config
from adapter.doctor import check, host, job, launched, machine, main
from adapter.doctor.check import FAILED, OK, WARNING, Case, Trial
from adapter.parallel.launchers import Launch

DEMO = load_config(ROOT / "configs" / "demo_tp4.yaml")
HERE = Launch(0, 2, 0, 2)  # rank 0 of two on this host
THERE = Launch(0, 2, 0, 1)  # of two hosts
NOTHING = {"PATH": os.environ["PATH"]}


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
    assert judged(host.imports, Case({}, packages=packages))[0] == OK and packages["av"]["facts"]["version"] == "1"


def test_no_ninja_no_compiler(tmp_path):
    assert judged(host.compiler, Case(NOTHING))[0] == OK
    status, found, do = judged(host.compiler, Case({"PATH": str(tmp_path)}))
    assert status == WARNING and "ninja and c++ not on PATH" in found and "apt install g++" in do
    os.symlink(shutil.which("ninja"), tmp_path / "ninja")
    _, found, do = judged(host.compiler, Case({"PATH": str(tmp_path)}))
    assert found.startswith("c++ not on PATH") and "ninja" not in do
    assert judged(host.compiler, Case({**NOTHING, "CXX": "no-such-compiler"}))[1].startswith("no-such-compiler not on")


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(host.sysconfig, "get_path", lambda name: str(tmp_path))
    status, found, do = judged(host.compiler, Case(NOTHING))
    assert status == FAILED and "Python.h" in found and "python3-dev" in do


def test_extensions_cache_that_cannot_be_written(tmp_path):
    assert judged(host.extensions_cache, Case({"TORCH_EXTENSIONS_DIR": str(tmp_path / "new")}))[0] == OK
    (tmp_path / "file").touch()
    status, found, do = judged(host.extensions_cache, Case({"TORCH_EXTENSIONS_DIR": str(tmp_path / "file" / "new")}))
    assert status == FAILED and "cannot be written" in found and "TORCH_EXTENSIONS_DIR" in do
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not os.statvfs("/proc").f_flag & os.ST_NOEXEC, reason="/proc is not mounted noexec")
def test_extensions_cache_on_a_file_system_without_execution(monkeypatch):
    monkeypatch.setattr(host.tempfile, "TemporaryFile", lambda dir: io.BytesIO())  # as if /proc could be written to
    assert "noexec" in judged(host.extensions_cache, Case({"TORCH_EXTENSIONS_DIR": "/proc"}))[1]


def test_lock_file_that_a_killed_job_left(tmp_path, monkeypatch):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    case = Case({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: True)
    assert judged(host.extensions_cache, case)[0] == OK, "a job may be compiling"
    os.utime(lock, (0, time.time() - 600))
    status, found, do = judged(host.extensions_cache, case)
    assert status == FAILED and str(lock) in found and do.endswith(f"rm {lock}")
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: False)
    assert judged(host.extensions_cache, case)[0] == OK, "a torch that locks through the kernel waits for no file"


def test_which_torch_waits_for_lock_files(tmp_path, monkeypatch):
    """Told from its source, since releases without a stub of ours cannot be installed side by side."""
    for source, waits in (("baton = FileBaton(os.path.join(build_directory, 'lock'))", True),
                          ("with FileLock(os.path.join(build_directory, 'lock')):", False)):
        (tmp_path / "utils").mkdir(exist_ok=True)
        (tmp_path / "utils" / "cpp_extension.py").write_text(source)
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(host.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert host.waits_for_lock_files() is waits
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert host.waits_for_lock_files()


def test_shared_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(machine, "shm_bytes", lambda: (64 << 20, 64 << 20))
    status, found, do = judged(host.dev_shm, Case({}, ranks=1))
    assert status == FAILED and "67 MB free" in found and "--shm-size" in do
    monkeypatch.setattr(machine, "shm_bytes", lambda: (1 << 30, 1 << 30))
    assert judged(host.dev_shm, Case({}, ranks=4))[0] == OK
    assert judged(host.dev_shm, Case({}, ranks=16))[0] == FAILED
    assert judged(host.dev_shm, Case({}, ranks=16, packages=on("cuda")))[0] == OK, "NCCL takes no segment a rank"
    monkeypatch.setattr(machine, "shm_bytes", lambda: (64 << 20, 64 << 20))
    status, found, _ = judged(host.dev_shm, Case({}, ranks=2, packages=on("cuda")))
    assert status == WARNING and "NCCL" in found


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
            "torch": {"facts": {"version": "2.9", "cuda": "13.0", "cuda_available": True, "cards": [], "peers": True,
                                "nccl": "2.2", **torch}}}


@pytest.mark.parametrize("torch, ranks, status, words", [
    ({"cuda": None, "cuda_available": False}, 1, WARNING, "build without CUDA"),
    ({"cuda_available": False}, 1, FAILED, "can use none: driver"),
    ({"cards": [{"name": "A", "bytes": 1}]}, 2, FAILED, "2 ranks on this host, 1 GPUs visible"),
    ({"cards": [{"name": "A", "bytes": 1}] * 2, "peers": False}, 2, WARNING, "not all of which reach"),
    ({"cards": [{"name": "A", "bytes": 1}] * 2}, 2, OK, "2 x A"),
])
def test_gpus(tmp_path, torch, ranks, status, words):
    """With device files and torch's answers as a machine with GPUs would have them."""
    (tmp_path / "nvidia0").touch()
    row = host.gpu(Case({}, ranks, packages=on("cuda", **torch)), tmp_path)
    assert row.status == status and words in row.found


def test_no_gpu_is_nothing_to_say(tmp_path):
    assert host.gpu(Case({}, packages=on("cpu")), tmp_path) is None


# A job's config and its launcher's environment


def test_plan_of_a_checkpoint_that_is_not_whole(tmp_path):
    assert judged(launched.plan, Case({}, config=DEMO))[0] == OK
    model = Path(shutil.copytree(DEMO.model.path, tmp_path / "model"))
    os.truncate(model / "model.safetensors", 1_000_000)
    broken = DEMO.model_copy(update={"model": DEMO.model.model_copy(update={"path": model})})
    status, found, _ = judged(launched.plan, Case({}, config=broken))
    assert status == FAILED and "model.safetensors" in found
    (model / "model.safetensors").unlink()
    assert "no safetensors file" in judged(launched.plan, Case({}, config=broken))[1]


def test_a_job_of_another_size_than_the_config():
    status, found, do = judged(launched.plan, Case({}, place=HERE, config=DEMO))
    assert status == FAILED and "the job has 2 ranks" in found and "--num_accelerators 4" in do
    assert judged(launched.plan, Case({}, place=Launch(0, 8, 0, 8), config=DEMO))[0] == OK, "two replicas"


@pytest.mark.parametrize("available, status", [(1_000_000_000, FAILED), (3_000_000_000, WARNING), (9_000_000_000, OK)])
def test_memory_for_the_shards(monkeypatch, available, status):
    monkeypatch.setattr(machine, "available_memory", lambda: available)
    judgement = judged(launched.memory, Case({}, ranks=4, config=DEMO))
    assert judgement[0] == status and "4 ranks here" in judgement[1] and "2.8 GB" in judgement[1], judgement


def test_memory_of_a_card():
    cards = [{"name": "A", "bytes": 1_000_000}]
    judgement = judged(launched.memory, Case({}, 4, config=DEMO, packages=on("cuda", cards=cards)))
    assert judgement[0] == FAILED and "on this card" in judgement[1]


@pytest.mark.parametrize("ranks, omp, status", [
    (2, None, WARNING), (2, "2", WARNING), (2, "many", WARNING), (2, "1", OK), (3, "1", WARNING), (1, None, OK),
])
def test_ranks_and_threads_against_cores(monkeypatch, ranks, omp, status):
    monkeypatch.setattr(launched, "usable_cores", lambda: 2)
    judgement = judged(launched.threads, Case({"OMP_NUM_THREADS": omp} if omp else {}, ranks))
    assert judgement[0] == status and (status == OK or "export OMP_NUM_THREADS=1" in judgement[2])
    assert ("busy-waits" in judgement[1]) is (ranks > 2)


@pytest.mark.parametrize("environ, place, status", [
    ({"GLOO_SOCKET_IFNAME": "lo"}, HERE, OK), ({"GLOO_SOCKET_IFNAME": "nosuch0"}, HERE, FAILED),
    ({"GLOO_SOCKET_IFNAME": "lo"}, THERE, FAILED), ({"GLOO_SOCKET_IFNAME": "l"}, HERE, FAILED),
    ({"NCCL_SOCKET_IFNAME": "l"}, HERE, OK), ({"NCCL_SOCKET_IFNAME": "=l"}, HERE, FAILED),
    ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, HERE, OK), ({"NCCL_SOCKET_IFNAME": "nosuch"}, HERE, FAILED),
])
def test_interfaces_that_the_environment_names(environ, place, status):
    judgement = judged(launched.network_interfaces, Case(environ, place=place))
    assert judgement[0] == status and (status == OK or next(iter(environ.values())) in judgement[1])


def test_master_address():
    def found(address, place):
        return judged(launched.network_interfaces, Case({"MASTER_ADDR": address}, place=place))

    assert found("127.0.0.1", HERE)[0] == OK
    assert found("127.0.0.1", THERE)[0] == FAILED and "other hosts" in found("127.0.0.1", THERE)[1]
    for place in (HERE, THERE):
        assert found("no-such-host.invalid", place)[0] == FAILED
        assert "no-such-host.invalid" in found("no-such-host.invalid", place)[1]


def test_master_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environ = {"MASTER_PORT": str(taken.getsockname()[1])}
        status, found, do = judged(launched.master_port, Case(environ, place=HERE))
        assert status == FAILED and environ["MASTER_PORT"] in found and "--master_port" in do
        assert launched.master_port(Case({**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}, place=HERE)) is None
        assert launched.master_port(Case(environ, place=replace(HERE, rank=1))) is None, "rank 0 listens"
    assert judged(launched.master_port, Case({"MASTER_PORT": str(free_port())}, place=HERE))[0] == OK
    assert judged(launched.master_port, Case({"MASTER_PORT": "70000"}, place=HERE))[0] == FAILED


# What ranks reported


def rank(number: int, **more):
    return {"rank": number, "host": "a", "cores": [0, 1], "threads": 1, "device": "cpu", "found": [],
            "versions": {"python": "3.11", "torch": "2.14.1"},
            "summing": "torch group; not DeepSpeed's shared-memory op: no compiler", "wrong_sums": [], **more}


def reported(*rows, **more):
    return Case({}, trial=Trial(how="exit code 0", ranks=rows, **more))


@pytest.mark.parametrize("one, second, status, words", [
    (job.all_reduce, {"wrong_sums": ["3000 bytes of bfloat16"]}, FAILED, "rank 1: 3000"),
    (job.all_reduce, {}, OK, "torch group; not DeepSpeed's shared-memory op: no compiler; right in float32"),
    (job.same_releases, {"versions": {"python": "3.11", "torch": "2.9"}}, FAILED, "torch 2.14.1 and 2.9"),
    (job.same_releases, {"versions": {"python": "3.10", "torch": "2.14.1"}}, FAILED, "python 3.10 and 3.11"),
    (job.rendezvous, {"host": "b"}, OK, "2 ranks on a, b"),
])
def test_what_ranks_reported(one, second, status, words):
    judgement = judged(one, reported(rank(0), rank(1, **second)))
    assert judgement[0] == status and words in judgement[1]
    assert judged(one, reported(rank(0), rank(1)))[0] == OK


def test_ranks_bound_to_one_core():
    status, found, _ = judged(job.binding, reported(rank(0, cores=[0]), rank(1, cores=[0])))
    assert status == WARNING and "2 ranks of a share 1 core" in found
    assert judged(job.binding, reported(rank(0, cores=[0]), rank(1)))[0] == OK


def test_ranks_that_did_not_join():
    late = Case({}, trial=Trial(code=None, how="no end after 9 s", steps={0: "join", 1: "import"}))
    status, found, do = judged(job.rendezvous, late)
    assert status == FAILED and "rank 0 was joining the job; rank 1 was importing" in found and "firewall" in do
    died = Case({}, trial=Trial(code=-11, how="died of SIGSEGV", steps={0: "sum"}, ranks=(rank(0),)))
    assert judged(job.rendezvous, died)[0] == FAILED and "CXX=none" in judged(job.rendezvous, died)[2]
