#!/usr/bin/env bash
# Every check: lint, types, unit tests, then real ranks. Sets up what it needs.
#   bash tests/run.sh                the suite as CI runs it
#   bash tests/run.sh -m sweep       the tp sizes between (any pytest arguments)
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
use_environment "$ROOT/launch/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"

# A Transformers release with the reshape bug, on top of the same torch and DeepSpeed: megabytes, not gigabytes.
OLD_RELEASE=4.49.0
old=$ROOT/.venv-transformers-$OLD_RELEASE
if ! "$old/bin/python" -c "import transformers" 2>/dev/null; then
    rm -rf "$old"
    "$PYTHON" -m venv "$old"
    "$old/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        "transformers==$OLD_RELEASE" "tokenizers==0.21.4" "huggingface_hub==0.36.2"
    "$old/bin/python" -m pip install --quiet --disable-pip-version-check "requests==2.32.5"
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$("$old/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
    "$old/bin/python" -c "import transformers"
fi
export QWENVL_TP_OLD_PYTHON=$old/bin/python

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest --durations=10 tests/unit tests/faults tests/parity "$@"
