#!/usr/bin/env bash
# The parity suite on every row of matrix.tsv, each in its own environment; a table of the results at the end.
#   bash tests/matrix.sh                         every row, the tp sizes CI runs
#   bash tests/matrix.sh --sweep oldest          all tp sizes, one row
#   bash tests/matrix.sh oldest -- -k "tp3"      any pytest arguments
# Exit code 1 if a row failed.
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
source "$ROOT/tests/environments.sh"
use_environment "$ROOT/launch/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rows=() options=(-m "not sweep")
while [ $# -gt 0 ]; do
    case $1 in
        --sweep) options=(-m "sweep or not sweep") ;;
        --) shift; options+=("$@"); break ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) rows+=("$1") ;;
    esac
    shift
done
[ ${#rows[@]} -gt 0 ] || mapfile -t rows < <(row_names)
known=" $(row_names | tr '\n' ' ')"
for name in "${rows[@]}"; do
    [[ $known == *" $name "* ]] || { echo "no row $name in tests/matrix.tsv; there are:$known" >&2; exit 2; }
done

logs=$(mktemp -d) failed=0
trap 'rm -rf "$logs"' EXIT
table=$logs/table skips=$logs/skips
count() { grep -oE "[0-9]+ $1" "$logs/last" | cut -d' ' -f1 || echo 0; }   # in pytest's last line

for name in "${rows[@]}"; do
    log=$logs/$name
    echo "== $name" >&2
    set +e   # not `if python=...`: in a condition `set -e` is off within too, and a failed step would pass
    python=$(set -e; row_environment "$name" >&2; echo "$ROW_PYTHON")
    ready=$?
    set -e
    if [ $ready -ne 0 ]; then
        failed=1
        echo "| $name | - | - | - | no environment | - | - |" >> "$table"
        continue
    fi
    versions=$("$python" -c 'from importlib.metadata import version
print(*map(version, ("transformers", "deepspeed", "torch")), sep=" | ")')
    began=$SECONDS code=0
    "$python" -m pytest -p no:cacheprovider -rPfEs "${options[@]}" tests/parity/test_parity.py \
        tests/parity/test_parity_of_families.py tests/parity/test_engine.py 2>&1 | tee "$log" \
        | grep --line-buffered -E '^(tests/|FAILED|ERROR|SKIPPED|=+ .* in )' >&2 || code=${PIPESTATUS[0]}
    exit=
    [ "$code" -eq 0 ] || { failed=1; exit=" (pytest exit $code)"; }
    tail -n 1 "$log" > "$logs/last"
    worst=$(grep -oE 'logit difference\| [0-9.e+-]+' "$log" | awk '{print $NF}' | sort -g | tail -n 1 || true)
    echo "| $name | $versions | $(count passed) / $(($(count failed) + $(count error)))$exit" \
        "| ${worst:--} | $((SECONDS - began)) |" >> "$table"
    grep '^SKIPPED' "$log" | sed "s/^/- $name: /" >> "$skips" || true
done

echo
echo "$(date -u +%Y-%m-%d), $("$PYTHON" -V), pytest ${options[*]@Q}"
echo
echo "| row | Transformers | DeepSpeed | torch | passed / failed | largest logit difference | seconds |"
echo "|---|---|---|---|---|---|---|"
cat "$table"
[ ! -s "$skips" ] || { echo; echo "Skipped, and why:"; cat "$skips"; }
exit $failed
