# Sourced by the other scripts: makes .venv in the checkout when it is missing or stale, and sets $root and $venv.
# .venv/s2a-stamp says what it was made for and is finished last, so that a half-made one is recognised.

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/s2a-stamp

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "s2a: no Python >= 3.11.4 on PATH; install Python 3.11.4 or later, 3.12 or 3.13 and try again" >&2
    return 1
}

stamp_for() { # python -> what a finished stamp holds; a moved checkout or a changed pyproject.toml is another one
    echo "$1" && echo "$root" && cksum <"$root/pyproject.toml"
}

is_current() {
    [[ -x $venv/bin/python && -x $venv/bin/s2a && -e $stamp ]] && [[ $(<"$stamp") == "$(stamp_for "$(head -n 1 "$stamp")")" ]]
}

make_venv() {
    local python
    python=$(find_python)
    # Half-made, moved, or for another Python: it goes. One that someone made by hand has no stamp and is installed into.
    if [[ -e $stamp && $(head -n 2 "$stamp") != "$python"$'\n'"$root" ]]; then
        rm -rf "$venv"
    fi
    echo "s2a: installing into $venv with $python; once, some minutes, about 6 GB with CUDA" >&2
    mkdir -p "$venv"
    echo "unfinished" >"$stamp"
    if ! "$python" -m venv "$venv" >&2; then
        echo "s2a: $python can't make a virtual environment, see above" >&2
        return 1
    fi
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[test]" >&2; then
        echo "s2a: the installation failed, see above; the next call starts it again" >&2
        return 1
    fi
    stamp_for "$python" >"$stamp"
}

is_current || make_venv
