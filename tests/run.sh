#!/usr/bin/env bash
# Every check: lint, types, unit tests, then real ranks. Sets up what it needs.
#   bash tests/run.sh                the suite as CI runs it
#   bash tests/run.sh -m sweep       the tp sizes between (any pytest arguments)
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
source "$ROOT/tests/environments.sh"
use_environment "$ROOT/launch/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"

# The other end of matrix.tsv: the oldest releases, Transformers' one with the reshape bug.
row_environment oldest
export QWENVL_TP_OLD_PYTHON=$ROW_PYTHON

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -c "from importlinter.cli import lint_imports_command as c; c()" --no-cache  # imports between rooms: pyproject.toml
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest --durations=10 tests/unit tests/stack tests/launchers tests/faults tests/proof tests/parity "$@"
