"""model.path as a hub id, against a small hub of the tests' own: what is downloaded, who waits, and each refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import TOKEN, Hub
from launching import ROOT
from loras import make_lora

DEMO = ROOT / "launch" / "demo" / "checkpoint"
LOAD = """
import json, sys
from adapter.config.load import load_config
from policies.errors import UserError
for overrides in json.loads(sys.argv[2]):
    try:
        print(json.dumps(str(load_config(sys.argv[1], overrides).model.path)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The demo with what must not be downloaded beside it, another name of it, and a model of two files."""
    home = tmp_path_factory.mktemp("models")
    demo = Path(shutil.copytree(DEMO, home / "demo"))
    for stray in ("pytorch_model.bin", "modeling_demo.py", "onnx/model.safetensors"):
        (demo / stray).parent.mkdir(exist_ok=True)
        (demo / stray).write_bytes(b"stray")
    lora = make_lora(home / "lora", {"model.layers.0.self_attn.q_proj": (224, 224)})
    return {"demo/qwen": demo, "demo/gated": demo, "demo/lora": lora}


@pytest.fixture
def hub(models, tmp_path):
    with Hub(models, gated={"demo/gated"}) as hub:
        yield hub


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "c.yaml").write_text("{model: {path: demo/qwen}, tensor_parallel: {tp_size: 2}}")
    return tmp_path / "c.yaml"


def environment(home: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and k != "RANK"}
    return clean | {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | more


def start(config: Path, *cases: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", LOAD, str(config), json.dumps(cases)], text=True, cwd=config.parent,
                            env=environment(config.parent, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def load(config: Path, *cases: list[str], **env: str) -> list:
    process = start(config, *cases, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines()]


def error_of(answer) -> str:
    """The message, of one line; what is wrong with the file itself is on a second one."""
    assert isinstance(answer, dict), answer
    *name, reported = answer["error"].splitlines()
    assert not name or (len(name) == 1 and "1 problem" in name[0]), answer["error"]
    return reported


def test_a_model_is_downloaded_once_and_found_again_offline(config, hub):
    first, again = load(config, [], ["model.revision=main"], HF_ENDPOINT=hub.url)
    assert first == again and Path(first).parents[2] == config.parent / "hf" / "hub"
    assert sorted(f.name for f in Path(first).iterdir()) == sorted(f.name for f in DEMO.iterdir())
    assert (Path(first) / "model.safetensors").read_bytes() == (DEMO / "model.safetensors").read_bytes()
    assert hub.sent("model.safetensors") == (DEMO / "model.safetensors").stat().st_size
    by_name, by_commit, gone = load(config, [], [f"model.revision={hub.commit('demo/qwen')}"],
                                    ["model.path=demo/other"], HF_HUB_OFFLINE="1")
    assert by_name == by_commit == first
    reported = error_of(gone)
    for word in ("model.path = demo/other", "HF_HUB_OFFLINE", str(config.parent / "hf"), "no directory of that name",
                 "one on the command line from the current directory"):
        assert word in reported


def test_each_refusal_is_one_line_that_says_what_to_do(config, hub):
    unknown, gated, revision = map(error_of, load(
        config, ["model.path=demo/none"], ["model.path=demo/gated"], ["model.revision=v9"], HF_ENDPOINT=hub.url))
    for reported, words in ((unknown, ["demo/none", hub.url, "no such model", "no directory", "spelling"]),
                        (gated, ["demo/gated", f"{hub.url}/demo/gated", "terms", "HF_TOKEN"]),
                        (revision, ["demo/qwen", "'v9'", "a branch"])):
        assert all(word in reported for word in words), reported
    assert hub.sent() == 0
    unreachable = error_of(load(config, [], HF_ENDPOINT="http://127.0.0.1:9")[0])
    assert "http://127.0.0.1:9 cannot be reached" in unreachable and "network" in unreachable
    allowed = load(config, ["model.path=demo/gated"], HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)[0]
    assert "models--demo--gated" in allowed


def test_a_directory_of_that_name_wins_and_paths_are_never_ids(config, hub):
    home = config.parent
    (home / "demo" / "qwen").mkdir(parents=True)
    local, dotted, absolute, pinned = load(config, [], ["model.path=./demo/none"], [f"model.path={home}/demo/none"],
                                           ["model.revision=main"], HF_ENDPOINT=hub.url)
    assert local == str(home / "demo" / "qwen")
    assert "no such directory" in error_of(dotted) and "no such directory" in error_of(absolute)
    assert "model.revision = 'main'" in error_of(pinned) and "directory" in error_of(pinned)
    assert not hub.log


def test_the_original_of_shards_may_be_a_hub_id(config, hub):
    asked = ["model.path=/", "weights={original: demo/qwen, original_revision: v9}"]
    assert "weights.original = demo/qwen" in error_of(load(config, asked, HF_ENDPOINT=hub.url)[0])


def test_ranks_of_a_host_download_once(config, hub):
    hub.pause = 1.0
    ranks = [start(config, [], RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="3", HF_ENDPOINT=hub.url) for r in range(3)]
    ended = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert hub.sent("model.safetensors") == (DEMO / "model.safetensors").stat().st_size


def test_a_wait_is_reported_and_bounded(monkeypatch, tmp_path, caplog):
    import fcntl

    from adapter.config import hub as module
    from policies.errors import UserError

    monkeypatch.setattr(module, "SAY_EVERY_S", 0.1)
    monkeypatch.setattr(module, "WAIT_S", 1.0)
    caplog.set_level("INFO", "adapter")
    with open(tmp_path / "lock", "w") as held, open(tmp_path / "lock", "w") as wanted:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="demo/qwen: another process of this host"):
            module._acquire(wanted.fileno(), "demo/qwen")
    assert "demo/qwen: waiting for another process of this host" in caplog.text


def plan(config: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "launch" / "plan.py"), "--config", str(config), *args], text=True,
                          cwd=config.parent, env=environment(config.parent, **env), capture_output=True, timeout=300)


def test_a_plan_reads_headers_only_and_says_the_same(config, hub):
    temporary = config.parent / "tmp"
    temporary.mkdir()
    far = plan(config, "--json", HF_ENDPOINT=hub.url, TMPDIR=str(temporary))
    near = plan(config, "--json", f"model.path={DEMO}")
    assert far.returncode == near.returncode == 0, far.stderr
    assert json.loads(far.stdout) == json.loads(near.stdout)
    assert hub.sent("model.safetensors") < (DEMO / "model.safetensors").stat().st_size / 10
    assert {file for _, file, _ in hub.log} == {"config.json", "model.safetensors"}
    assert not list(temporary.iterdir()) and not list(config.parent.glob("hf/**/*.json"))


def test_an_adapter_is_downloaded_for_a_plan_too(config, hub):
    done = plan(config, "--json", "model.adapters=[demo/lora]", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    adapter, = json.loads(done.stdout)["adapters"]
    assert adapter == {"path": "demo/lora", "weights": 1, "r": [4], "bytes": 4 * 8 * 224}
    assert hub.sent("adapter_model.safetensors") > adapter["bytes"] and not hub.sent("tokenizer.json")
    done = plan(config, "model.adapters=[demo/none]", HF_ENDPOINT=hub.url)
    assert done.returncode == 2 and "model.adapters = demo/none: " in done.stderr, done.stderr


def test_a_plan_finds_what_is_wrong_with_a_remote_model(config, models, hub, tmp_path):
    broken = Path(shutil.copytree(DEMO, tmp_path / "broken"))
    described = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(described | {"vocab_size": 7}))
    hub.models = {**models, "demo/broken": broken}
    for overrides, words in ((["model.path=demo/broken"], ["embed_tokens", "has shape"]),
                             (["model.path=demo/none"], ["no such model"]), (["model.path=demo/gated"], ["HF_TOKEN"]),
                             (["model.revision=v9"], ["'v9'"])):
        done = plan(config, *overrides, HF_ENDPOINT=hub.url)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert all(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr


def test_a_long_header_takes_a_second_request(tmp_path, hub, config):
    """Of 72B models headers have megabytes; the demo's has 12 KB."""
    raw = (DEMO / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * 200_000
    long = Path(shutil.copytree(DEMO, tmp_path / "long"))
    (long / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    hub.models = {"demo/qwen": long}
    done = plan(config, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert [size for method, file, size in hub.log if file == "model.safetensors"][-1] > 100_000


def test_names_of_snapshots():
    from adapter.config.hub import shown

    assert shown(Path("/c/hub/models--Qwen--Qwen2-VL-7B-Instruct/snapshots/0a1b")) == "Qwen/Qwen2-VL-7B-Instruct"
    assert shown(Path("/models/mine")) == "/models/mine"


def test_messages_name_the_id_and_not_the_cache(config, hub):
    done = plan(config, "tensor_parallel.tp_size=100", "--json", HF_ENDPOINT=hub.url)
    assert done.returncode == 2 and not re.search("snapshots|qwenvl-tp-plan", done.stdout + done.stderr)


def test_a_plan_that_is_ended_leaves_no_directory(config, hub):
    temporary = config.parent / "tmp"
    temporary.mkdir()
    hub.pause = 5.0
    process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "plan.py"), "--config", str(config)], text=True,
                               env=environment(config.parent, HF_ENDPOINT=hub.url, TMPDIR=str(temporary)),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(temporary.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=100)
    assert process.returncode == 143 and not list(temporary.iterdir())
