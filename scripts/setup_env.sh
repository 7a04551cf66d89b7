#!/usr/bin/env bash
# Makes .venv: torch, the locked packages, this project (editable, with its compiled library). Safe to repeat; does
# nothing when nothing changed.
#
# The packages of a finished environment are kept under the user's cache, keyed by the lock files and the Python that
# they are for, and hard-linked into the next checkout's own .venv (seconds instead of minutes, no second copy on disk).
# Not a shared environment behind a symlink: two checkouts would then overwrite each other's editable install.
# Not a folder of wheels: unpacking 2 GB again is most of the time. pip, Python and `sed -i` replace files, never write
# into them, so a link is as good as a copy; should somebody edit a package in place, the cache notices and is remade.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
locks=(requirements/build.lock requirements/cpu.lock requirements/dev.lock requirements/bench.lock)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sglang-er
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1
unset PYTHONHOME PYTHONPATH

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The lock files were resolved for 3.11 and hold for 3.12; several of the pinned packages have nothing for 3.10.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3 python)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            2>/dev/null; then
            real_python "$candidate"
            return
        fi
    done
    die "need Python 3.11 or 3.12 with its venv module (tried ${candidates[*]}); install it, or name it with PYTHON="
}

real_python() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))'; }

# torch comes with its dependencies, because the CUDA build needs the CUDA libraries that it pins and the CPU build
# needs none; everything else exactly as locked. A CUDA torch also pins its own triton, which then must stay.
install_packages() {
    local pip=("$venv/bin/python" -m pip install --quiet --no-warn-script-location) lists
    lists=$(mktemp -d)
    grep -hvE '^(#|triton==)' "${locks[@]}" >"$lists/all"
    say "installing torch"
    "${pip[@]}" -c "$lists/all" -r requirements/torch.lock
    if "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(any(r.startswith("triton") for r in m.requires("torch") or []))'; then
        grep -h '^triton==' "${locks[@]}" >>"$lists/all"
    fi
    say "installing the locked packages"
    "${pip[@]}" --no-deps -r "$lists/all"
    rm -rf "$lists"
    "$venv/bin/python" scripts/check_env.py requirements/torch.lock "${locks[@]}"
}

# Environments are not relocatable: scripts name their interpreter, so they are rewritten (into new files).
link_environment() { # from to old_home new_home
    cp -al "$1" "$2" 2>/dev/null || { rm -rf "$2"; cp -a --reflink=auto "$1" "$2"; }
    { grep -lIZF -r "$3" "$2/bin" "$2/pyvenv.cfg" || true; } | xargs -0r sed -i "s|$3|$4|g"
}

entry_is_whole() { # stamp written last, and no linked file written to since
    [[ -f $1/stamp ]] && [[ -z $(find "$1/env" -type f -newer "$1/stamp" -print -quit) ]]
}

make_environment() {
    local entry=$cache/env-$key
    mkdir -p "$cache"
    exec 8<"$cache"
    flock --nonblock 8 || { say "waiting for another setup that is filling the cache"; flock 8; }
    if [[ -d $venv ]]; then
        say "bringing the existing .venv up to date"
        install_packages
    elif entry_is_whole "$entry"; then
        say "linking .venv from the cache"
        link_environment "$entry/env" "$venv.partial" "$(<"$entry/stamp")" "$venv"
        mv "$venv.partial" "$venv"
    else
        say "making .venv (a few minutes the first time)"
        rm -rf "$entry" "$cache"/partial.*
        # Made under its final name, which its scripts will contain; the marker says that it is not finished.
        mkdir "$venv"
        touch "$venv/.unfinished"
        "$python" -m venv "$venv"
        install_packages
        link_environment "$venv" "$cache/partial.$$" "$venv" "$venv"
        rm "$cache/partial.$$/.unfinished"
        mkdir "$entry"
        mv "$cache/partial.$$" "$entry/env"
        printf '%s\n' "$venv" >"$entry/stamp.partial"
        sync "$entry" 2>/dev/null || true
        mv "$entry/stamp.partial" "$entry/stamp"
        touch "$entry/stamp"
        rm "$venv/.unfinished"
        # Two environments are kept: before and after a change of the lock files.
        find "$cache" -maxdepth 1 -name 'env-*' -printf '%T@ %p\n' | sort -rn | tail -n +3 | cut -d' ' -f2- | xargs -r rm -rf
    fi
    exec 8<&-
    printf '%s\n' "$key $root" >"$venv/.packages"
}

install_project() {
    say "building and installing sglang-er"
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    printf '%s\n' "$project" >"$venv/.project"
}

exec 9<requirements
flock --nonblock 9 || { say "waiting for another setup in this checkout"; flock 9; }
rm -rf "$venv.partial"
if [[ -e $venv/.unfinished ]] || { [[ -e $venv ]] && ! "$venv/bin/python" -c '' 2>/dev/null; }; then
    say "removing an unfinished .venv"
    rm -rf "$venv"
fi
# An environment keeps the interpreter that it was made with.
if [[ -d $venv ]]; then
    python=$(real_python "$venv/bin/python")
    wanted=$([[ -z ${PYTHON:-} ]] && echo "$python" || find_python)
    [[ $wanted == "$python" ]] || die ".venv was made with $python; remove it to use $wanted"
else
    python=$(find_python)
fi
key=$({ cat requirements/torch.lock "${locks[@]}"; "$python" -VV; echo "$python"; } | sha256sum | cut -c1-16)
# Python sources are live in an editable install; what is listed here is read at install time.
[[ -f CMakeLists.txt && -d csrc ]] || die "CMakeLists.txt or csrc/ is missing: the checkout is incomplete"
project=$({ echo "$root"; find pyproject.toml setup.py CMakeLists.txt csrc python/sglang_er/__init__.py -type f -print0 |
    sort -z | xargs -0 sha256sum; } | sha256sum | cut -c1-16)

[[ -f $venv/.packages && $(<"$venv/.packages") == "$key $root" ]] || make_environment
[[ -f $venv/.project && $(<"$venv/.project") == "$project" &&
    -f python/sglang_er/kernels/cpu/libsglang_er_cpu.so ]] || install_project
say "ready: .venv ($("$venv/bin/python" -V))"
