"""Each check of the doctor with the cause it is there for planted, and without it; and the doctor where it all is."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, free_port

from adapter.config.load import load_config
from adapter.doctor import check, child, host, job, launched, machine, main
from adapter.doctor.check import FAILED, OK, WARNING, Case
from adapter.parallel.launchers import LAUNCHERS, Launch

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


@pytest.fixture
def lock(tmp_path) -> Path:
    file = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_lock_file_that_a_killed_job_left(tmp_path, lock, monkeypatch):
    case = Case({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: True)
    assert judged(host.stale_lock, case)[0] == WARNING, "another host may be compiling"
    os.utime(lock, (0, time.time() - 600))
    status, found, do = judged(host.stale_lock, case)
    assert status == FAILED and "10.0 minutes" in found and do.endswith(f"rm {lock}")
    with lock.open():
        assert judged(host.stale_lock, case)[0] == OK, "its holder lives"
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: False)
    assert judged(host.stale_lock, case)[0] == OK, "a torch that locks through the kernel does not wait for a file"
    lock.unlink()
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: True)
    assert judged(host.stale_lock, case)[0] == OK


def test_lock_of_a_stopped_process(tmp_path, lock, monkeypatch):
    """As torch 2.14 locks, through the kernel: it is freed when its holder ends, not when it is stopped."""
    monkeypatch.setattr(host, "waits_for_lock_files", lambda: False)
    case = Case({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=-1, stdout=-1) as holder:
        holder.stdout.readline()
        assert judged(host.stale_lock, case)[0] == OK, "it compiles"
        holder.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        status, found, do = judged(host.stale_lock, case)
        holder.kill()
    assert status == FAILED and f"process {holder.pid} (stopped" in found and "kill" in do


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
    assert not list(check.run([host.dev_shm], Case({}, packages=on("cuda"))))


def test_segments_of_killed_jobs():
    file = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_doctor_{os.getpid()}_0")
    try:
        file.write_bytes(b"x")
        assert str(file) not in judged(host.stale_segments, Case({}))[2], "a job may be about to map it"
        os.utime(file, (0, time.time() - 120))
        status, _, do = judged(host.stale_segments, Case({}))
        assert status == WARNING and str(file) in do.split()
        import mmap

        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 1, access=mmap.ACCESS_READ):
            assert str(file) not in judged(host.stale_segments, Case({}))[2].split(), "a living process has it"
    finally:
        file.unlink()
    assert str(file) not in judged(host.stale_segments, Case({}))[2]


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


def test_numa_nodes_without_numactl(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "numa_nodes", lambda: 2)
    assert judged(host.numactl, Case({"PATH": str(tmp_path)}))[0] == WARNING
    (tmp_path / "numactl").touch(0o755)
    assert judged(host.numactl, Case({"PATH": str(tmp_path)}))[0] == OK


def test_few_open_files():
    assert judged(host.open_files, Case({}))[0] == OK
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert judged(host.open_files, Case({}))[0] == WARNING
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_file_names_that_are_not_utf8():
    code = ("from adapter.doctor import host; from adapter.doctor.check import Case; "
            "print(host.encoding(Case({})).status)")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for locale, status in (({"LC_ALL": "C.UTF-8"}, OK), (ascii_only, WARNING)):
        told = subprocess.run([sys.executable, "-c", code], env={**NOTHING, **locale}, cwd=ROOT, capture_output=True)
        assert told.stdout.decode().strip() == status, told.stderr


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


@pytest.mark.parametrize("ranks, omp, cores, threads", [
    (2, None, OK, WARNING), (2, "2", OK, WARNING), (2, "many", OK, WARNING), (2, "1", OK, OK), (3, "1", WARNING, OK),
])
def test_ranks_and_threads_against_cores(monkeypatch, ranks, omp, cores, threads):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    case = Case({"OMP_NUM_THREADS": omp} if omp else {}, ranks)
    assert judged(launched.cores, case)[0] == cores
    status, _, do = judged(launched.threads, case)
    assert status == threads and (status == OK or do == "export OMP_NUM_THREADS=1")


def test_host_name_that_is_a_loopback_address(monkeypatch):
    for address, environ, status in (("127.0.1.1", {}, FAILED), ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "lo"}, OK),
                                     ("10.0.0.1", {}, OK), (None, {}, FAILED)):
        def answer(name: str, address: str | None = address) -> str:
            if address is None:
                raise socket.gaierror(-2, "Name or service not known")
            return address

        monkeypatch.setattr(machine, "resolve", answer)
        assert judged(launched.host_name, Case(environ, place=THERE))[0] == status
    assert launched.host_name(Case({}, place=HERE)) is None, "one host is joined on loopback"


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
    assert judged(launched.master_address, Case({"MASTER_ADDR": "127.0.0.1"}, place=HERE))[1].endswith("through lo")
    assert "other hosts" in judged(launched.master_address, Case({"MASTER_ADDR": "127.0.0.1"}, place=THERE))[1]
    status, found, _ = judged(launched.master_address, Case({"MASTER_ADDR": "no-such-host.invalid"}, place=HERE))
    assert status == FAILED and "no-such-host.invalid" in found


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


def test_local_size():
    assert judged(launched.local_size, Case({"RANK": "0"}, place=THERE))[0] == WARNING
    assert judged(launched.local_size, Case({"LOCAL_SIZE": "2"}, place=HERE))[0] == OK
    assert "script of your own" in judged(launched.local_size, Case({"LOCAL_WORLD_SIZE": "2"}, place=HERE))[1]


def test_mpi_of_another_kind_or_none():
    ours = {"mpi4py": {"facts": {"library": "Open MPI v5.0.11"}}}
    other = {"mpi4py": {"facts": {"library": "MPICH Version: 4.3"}}}
    absent = {"mpi4py": {"error": "ModuleNotFoundError: No module named 'mpi4py'"}}
    broken = {"mpi4py": {"error": "RuntimeError: cannot load MPI library"}}
    mpirun = {"OMPI_COMM_WORLD_SIZE": "2"}
    assert judged(launched.mpi, Case(mpirun, packages=ours))[0] == OK
    status, found, _ = judged(launched.mpi, Case(mpirun, packages=other))
    assert status == FAILED and "MPICH" in found
    assert judged(launched.mpi, Case(mpirun, packages=absent))[0] == FAILED
    assert judged(launched.mpi, Case({}, packages=broken))[0] == WARNING
    assert launched.mpi(Case({}, packages=absent)) is None


# What ranks told


def rank(number: int, **more):
    return {"rank": number, "host": "a", "cores": "0-1", "core_list": [0, 1], "threads": 1, "device": "cpu",
            "python": "3.11", "versions": {"torch": "2.14.1"}, "warnings": [], "found": [],
            "summing": "torch group; not DeepSpeed's shared-memory op: no compiler",
            "sums": {"wrong": [], "microseconds": {"3000": 3}}, **more}


def told(*rows, **more):
    return Case({}, trial={"steps": {}, "errors": {}, "how": "exit code 0", "code": 0, "ranks": list(rows),
                           "joined_s": 1.0, **more})


@pytest.mark.parametrize("one, second, status, words", [
    (job.all_reduce, {"sums": {"wrong": ["3000 bytes of bfloat16"], "microseconds": {}}}, FAILED, "rank 1: 3000"),
    (job.all_reduce, {}, OK, "torch group; not DeepSpeed's shared-memory op: no compiler; right in float32"),
    (job.peers, {"warnings": ["rank 0 will not be named"]}, WARNING, "will not be named"),
    (job.same_releases, {"versions": {"torch": "2.9"}}, FAILED, "torch 2.14.1 and 2.9"),
    (job.same_releases, {"python": "3.10"}, FAILED, "python 3.10 and 3.11"),
    (job.rendezvous, {"host": "b"}, OK, "2 ranks on a, b"),
])
def test_what_ranks_told(one, second, status, words):
    judgement = judged(one, told(rank(0), rank(1, **second)))
    assert judgement[0] == status and words in judgement[1]
    assert judged(one, told(rank(0), rank(1)))[0] == OK


def test_ranks_bound_to_one_core():
    one = {"cores": "0", "core_list": [0]}
    status, found, _ = judged(job.binding, told(rank(0, **one), rank(1, **one)))
    assert status == WARNING and "2 ranks of a share 1 core" in found
    assert judged(job.binding, told(rank(0, **one), rank(1)))[0] == OK


def test_ranks_that_did_not_join():
    status, found, do = judged(job.rendezvous, told(code=None, how="no end after 9 s", steps={0: "join", 1: "import"}))
    assert status == FAILED and "rank 0 was joining the job; rank 1 was importing" in found and "firewall" in do
    died = told(rank(0), code=-11, how="died of SIGSEGV", steps={0: "sum"})
    assert judged(job.rendezvous, died)[0] == FAILED and "CXX=none" in judged(job.rendezvous, died)[2]


# The command


def test_a_check_that_breaks_or_hangs_is_a_row(monkeypatch):
    def breaks(case: Case):
        raise KeyError("x")

    def hangs(case: Case):
        time.sleep(30)

    monkeypatch.setattr(check, "PATIENCE_S", 0.2)
    rows = list(check.run([breaks, hangs, host.encoding], Case({})))
    assert [(row.check, row.status) for row in rows] == [("breaks", FAILED), ("hangs", FAILED), ("encoding", OK)]
    assert "KeyError" in rows[0].found and "no answer" in rows[1].found


def test_launchers_are_told_from_their_environment():
    for launcher in (launcher for launcher in LAUNCHERS if launcher.discover and launcher.mark):
        assert machine.place({launcher.world_size: "4", launcher.rank: "3"}).rank == 3, launcher.name
    assert machine.place({"PATH": "/"}) is None
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert machine.place(torchrun) == Launch(1, 4, 1, 2)
    assert machine.place({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == Launch(1, 2, 1, 2)


def test_secrets_are_not_shown():
    shown = machine.shown_environment({"HF_TOKEN": "hf_abc", "NCCL_AUTH_KEY": "abc", "NCCL_DEBUG": "INFO",
                                       "AWS_X": "abc", "OMPI_MCA_x": "tcp://me:abc@host", "RANK": "0"})
    assert shown["NCCL_DEBUG"] == "INFO" and shown["RANK"] == "0" and set(shown) == {
        "HF_TOKEN", "NCCL_AUTH_KEY", "NCCL_DEBUG", "OMPI_MCA_x", "RANK"}
    assert "abc" not in json.dumps(shown)


def test_limits_of_a_container(monkeypatch, tmp_path):
    """cgroup v2: the smallest of the group's own limits and those around it; v1 beside it."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "job" / "inner").mkdir(parents=True)
    read = machine._read
    monkeypatch.setattr(machine, "_read", lambda f: "0::/job/inner\n" if f == Path("/proc/self/cgroup") else read(f))
    assert machine.quota() is None
    for name, text in {"job/cpu.max": "150000 100000", "job/inner/cpu.max": "max 100000", "job/memory.max": "2000000",
                       "job/memory.current": "1500000", "job/memory.stat": "inactive_file 500000\n"}.items():
        (tmp_path / name).write_text(text)
    assert machine.quota() == 1.5 and machine.usable_cores() == 1
    assert machine.memory()["limit"] == 2_000_000 and machine.available_memory() == 1_000_000


def test_a_child_and_all_it_started_are_ended(tmp_path):
    code = ("import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
            "print('{\"pid\": %d}' % p.pid, flush=True); time.sleep(60)")
    ended = child.run([sys.executable, "-c", code], 1)
    assert ended.code is None and ended.seconds < 10
    assert machine.process(ended.rows[0]["pid"])[1] == "gone"


def doctor(*args: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "launch" / "doctor.py"), *args], capture_output=True, text=True,
                          timeout=100, env={**os.environ, **environ})


def test_the_report(stub):
    """With torch broken, which is when people run it: it says so, gives the facts it has, and exits 1."""
    stub("torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    run = doctor("--ranks", "2", HF_TOKEN="hf_abc")
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "**failed**: imports: import torch: ImportError: libcudart.so.13" in run.stdout
    assert "rendezvous: not tried: a job cannot run so, see imports" in run.stdout
    assert f"python: {sys.version.split()[0]}" in run.stdout and "hf_abc" not in run.stdout
    whole = json.loads(doctor("--json").stdout)
    assert whole.keys() == {"facts", "checks", "ranks"}
    assert whole["checks"][0].keys() == {"check", "status", "found", "do"}
    assert whole["facts"]["packages"]["torch"]


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="no virtual environment: the packages are in the interpreter")
def test_the_doctor_needs_no_package():
    """The interpreter that the virtual environment was made from, without anything installed."""
    run = subprocess.run([sys._base_executable, str(ROOT / "launch" / "doctor.py"), "--config",
                          str(ROOT / "configs" / "demo_tp4.yaml")], capture_output=True, text=True, timeout=60,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, cwd="/")
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "import torch: ModuleNotFoundError" in run.stdout and "**failed**: config: " in run.stdout


@pytest.mark.parametrize("args, words", [
    (["--config", "no-such.yaml"], "no-such.yaml"), (["model.dtype=float32"], "--config"),
    (["--ranks", "0"], "number of ranks"),
])
def test_bad_input(args, words):
    run = doctor(*args)
    assert run.returncode == 2 and words in run.stderr and not run.stdout and "Traceback" not in run.stderr
