# Sourced by run.sh and matrix.sh, after use_environment. `row_environment NAME` sets ROW_PYTHON to an interpreter that
# has the releases of that row of matrix.tsv on top of the main environment: megabytes, but for a row with another torch.
TABLE=$ROOT/tests/matrix.tsv

row_names() { awk -F'\t' '!/^#/ && NF {print $1}' "$TABLE"; }

row_environment() {
    local row name torch torchvision transformers tokenizers hub deepspeed extra where main site made env=$ROOT/.venv-matrix/$1
    local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    row=$(awk -F'\t' -v name="$1" '!/^#/ && $1 == name' "$TABLE")
    [ -n "$row" ] || { echo "no row $1 in tests/matrix.tsv; there are: $(row_names | tr '\n' ' ')" >&2; return 2; }
    IFS=$'\t' read -r name torch torchvision transformers tokenizers hub deepspeed extra where <<< "$row"
    local pins=() torches=() pin
    for pin in transformers=="$transformers" tokenizers=="$tokenizers" huggingface_hub=="$hub" \
               deepspeed=="$deepspeed"; do
        [ "${pin##*==}" = - ] || pins+=("$pin")
    done
    for pin in torch=="$torch" torchvision=="$torchvision"; do
        [ "${pin##*==}" = - ] || torches+=("$pin")
    done
    if has "$PYTHON" "${pins[@]}" "${torches[@]}"; then ROW_PYTHON=$PYTHON; return; fi   # the main environment is this row
    ROW_PYTHON=$env/bin/python
    main=$("$PYTHON" -c "$purelib")
    made="$row"$'\n'"$main $("$PYTHON" -V)"   # written last: without it the environment is half made, or another row's
    if [ "$(cat "$env/made" 2>/dev/null)" = "$made" ] && has "$ROW_PYTHON" "${pins[@]}" "${torches[@]}"; then
        return
    fi
    echo "making the environment $name ..." >&2
    rm -rf "$env"
    "$PYTHON" -m venv --without-pip "$env"   # the main one's pip and setuptools serve
    site=$("$ROW_PYTHON" -c "$purelib")
    echo "import site; site.addsitedir('$main')" > "$site/main.pth"
    if ! has "$PYTHON" deepspeed=="$deepspeed" "${torches[@]}"; then   # they would rebuild each other's ops in one place
        echo "import os; os.environ.setdefault('TORCH_EXTENSIONS_DIR', '$env/extensions')" >> "$site/main.pth"
    fi
    if [ ${#torches[@]} -gt 0 ]; then
        "$ROW_PYTHON" -m pip install --quiet --disable-pip-version-check "${torches[@]}"   # with its CUDA libraries
    fi
    # DeepSpeed is built from source and wants torch for it. The packages of these pins are the main environment's.
    DS_BUILD_OPS=0 "$ROW_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        "${pins[@]}"
    [ "$extra" = - ] || "$ROW_PYTHON" -m pip install --quiet --disable-pip-version-check ${extra//,/ }
    "$ROW_PYTHON" -W ignore -c "import deepspeed, transformers" >/dev/null
    has "$ROW_PYTHON" "${pins[@]}" "${torches[@]}"
    echo "$made" > "$env/made"
}

has() {  # PYTHON NAME==VERSION...
    local python=$1; shift
    "$python" - "$@" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
for name, _, pin in (a.partition("==") for a in sys.argv[1:]):
    assert version(name).split("+")[0] == pin, (name, version(name), pin)
version("torch")  # the main environment is still there
PY
}
