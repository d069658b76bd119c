#!/usr/bin/env bash
# Every check: lint, types, imports between rooms, unit tests, then ranks. Sets up what it needs.
#   bash tests/run.sh                what every change should pass
#   bash tests/run.sh --all          also what takes its time: CI runs it
#   bash tests/run.sh -k two_hosts   any pytest arguments
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
source "$ROOT/tests/environments.sh"
use_environment "$ROOT/launch/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"

selected=()
if [ "${1:-}" = --all ]; then
    shift
    selected=(-m "")
    row_environment oldest   # an end of matrix.tsv: the oldest releases, Transformers' one with the reshape bug
    export QWENVL_TP_OLD_PYTHON=$ROW_PYTHON
fi

"$PYTHON" -m ruff check .
"$PYTHON" -c "from importlinter.cli import lint_imports_command as c; c()" --no-cache  # pyproject.toml has the rooms
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$PYTHON" -m mypy >"$types" 2>&1 &  # beside the tests, some of which wait
checking=$!

# Unit tests first: they want no process group. Small files last, so that neither worker waits long for the other.
failed=0
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests/unit tests/launchers tests/stack \
    tests/proof tests/parity tests/faults "${selected[@]}" "$@" || failed=$?
wait $checking || failed=1
cat "$types"
exit $failed
