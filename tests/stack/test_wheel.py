"""The wheel, in an environment of its own and away from the checkout: the three lines' names and the commands."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from launching import ROOT, Running

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

PACKAGES = ("adapter", "policies")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "models")
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}  # import name -> where it differs from the package's
IN_EXTRAS = {"matplotlib", "mpi4py"}
OF_PEERS = {"peer", "vllm"}  # of scripts that run by path, elsewhere: a file beside them, and what they time
MODULES = ["adapter", "adapter.commands.generate", "adapter.commands.verify", "adapter.doctor"]  # what `--module` takes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays as it is, and with a stray package beside the real ones."""
    home = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, home / "checkout", ignore=LEFT_OUT)
    (copy / "strays").mkdir()
    (copy / "strays" / "__init__.py").touch()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--disable-pip-version-check", "--wheel-dir", str(home), str(copy)], check=True)
    return next(home.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of an environment with the wheel in it, and what the wheel requires from the main one."""
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    python = home / "env" / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                          capture_output=True, text=True).stdout.strip()
    Path(site, "main.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--disable-pip-version-check", str(wheel)], check=True)
    return python


@pytest.fixture(scope="module")
def away(tmp_path_factory) -> Path:
    """A directory with the demo's checkpoint, pictures and config, and nothing else of the checkout."""
    home = tmp_path_factory.mktemp("away")
    for part in ("configs", "launch/demo/checkpoint", "launch/demo/pictures"):
        shutil.copytree(ROOT / part, home / part)
    shutil.copy(ROOT / "launch/demo/requests.jsonl", home / "launch/demo")
    return home


def run(python: Path, away: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([str(python), *args], cwd=away, env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    """Every module of the checkout's two packages, the C++ sources, the marker for type checkers; no tests, launch or
    configs."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for package in PACKAGES
                for pattern in ("**/*.py", "**/csrc/*.cpp", "**/csrc/*.h", "**/*.html", "py.typed")
                for file in (ROOT / package).glob(pattern)}
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} | {"adapter/kernels/csrc/linear.cpp"} <= names


def test_the_wheel_says_what_it_needs(wheel):
    """As pyproject.toml has it, and all that the two packages import; only what an extra brings may be missing."""
    archive = zipfile.ZipFile(wheel)
    text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(map(spaceless, required)) == sorted(map(spaceless, project["dependencies"]))
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    imported = {top for package in PACKAGES for file in (ROOT / package).glob("**/*.py") for top in imports(file)}
    needed = {DISTRIBUTIONS.get(top, top) for top in imported - sys.stdlib_module_names - set(PACKAGES)}
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in required}
    assert needed - names == IN_EXTRAS | OF_PEERS


def imports(file: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


def spaceless(requirement: str) -> str:
    """Name and bounds, in one order: backends sort the bounds."""
    name = requirement.rstrip("<>=!~,.0123456789 ")
    return name + ",".join(sorted(requirement[len(name):].replace(" ", "").split(",")))


def test_the_three_lines_are_importable(installed, away):
    done = run(installed, away, "-W", "ignore", "-c", "import adapter, policies; print(adapter.__file__);"
               "print(adapter.init_inference.__name__, adapter.deepspeed_kwargs.__name__)")
    assert done.returncode == 0, done.stderr
    reported = done.stdout.splitlines()  # DeepSpeed talks on stdout too
    assert any(line.startswith(str(installed.parents[1])) for line in reported) and str(ROOT) not in done.stdout
    assert "init_inference deepspeed_kwargs" in reported


@pytest.mark.parametrize("module", MODULES)
def test_commands_are_modules(installed, away, module):
    done = run(installed, away, "-m", module, "--help")
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def test_the_console_command(installed, away):
    script = str(installed.with_name("qwenvl-tp"))
    assert "qwenvl-tp verify" in run(installed, away, script, "--help").stdout
    done = run(installed, away, script, "plan", "--config", "configs/demo_tp4.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tp_size"] == 4
    done = run(installed, away, script, "generate", "--config", "configs/demo_tp4.yaml", "tensor_parallel.tp_size=29")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "tp_size 29" in done.stderr, done.stderr


def test_the_table_in_other_words(installed, away):
    model = str(ROOT / "launch" / "demo" / "checkpoint")
    done = run(installed, away, "-m", "policies", model, "--dialect", "tp_plan")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lm_head"] == "colwise_gather_output"


@pytest.mark.ranks
def test_generate_over_ranks(installed, away):
    """The console command starts DeepSpeed's launcher, and that starts the ranks, all of them of this environment."""
    job = Running([str(installed.with_name("qwenvl-tp")), "generate", "--config", "configs/demo_tp4.yaml",
                   "tensor_parallel.tp_size=2"], {"PYTHONPATH": ""}, cwd=away)
    outcome = job.finish()
    assert not (left := job.leftovers()), left
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert rows[-1]["summary"] and rows[-1]["answered"] == len(rows) - 1 == 12
    assert all(row["correct"] for row in rows[:-1])
