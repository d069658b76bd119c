# Sourced by the two commands. `use_environment FILE...` sets PYTHON to an interpreter that has every pinned package of
# the files: the caller's PYTHON, .venv, or python3 if one of them fits, else .venv, made (or completed) now.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1   # nothing here needs the hub

fits() {
    local python=$1; shift
    "$python" - "$@" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
for file in sys.argv[1:]:
    for line in open(file):
        name, _, pin = line.strip().partition("==")
        assert version(name).split("+")[0] == pin, (name, version(name), pin)
PY
}

use_environment() {
    local candidate
    for candidate in "${PYTHON:-}" "$ROOT/.venv/bin/python" "$(command -v python3 || true)"; do
        if [ -n "$candidate" ] && [ -x "$(command -v "$candidate" || true)" ] && fits "$candidate" "$@"; then
            PYTHON=$(command -v "$candidate"); export PATH="$(dirname "$PYTHON"):$PATH"; return
        fi
    done
    echo "setting up .venv (about 6 GB, once) ..." >&2
    [ -x "$ROOT/.venv/bin/python" ] || python3 -m venv "$ROOT/.venv"
    PYTHON=$ROOT/.venv/bin/python
    export PATH="$ROOT/.venv/bin:$PATH"   # ninja, which DeepSpeed's op is built with, is looked for there
    local files=() file
    for file in "$@"; do files+=(-r "$file"); done
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${files[@]}"
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
