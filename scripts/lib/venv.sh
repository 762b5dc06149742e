# shellcheck shell=bash
# A virtual environment with pinned packages. Source it from the top of the checkout, then:
#
#   ensure_venv EXTRA[,EXTRA]                .venv, the package as a link to this checkout
#   ensure_venv EXTRA[,EXTRA] FOLDER copy    FOLDER, the package as a copy, renewed by every call
#
# Later calls cost nothing until pyproject.toml, constraints.txt or the extras asked for change.

venv_fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# The first Python 3.11 or newer, by the names it has on Debian and Ubuntu; PYTHON names another one.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    venv_fail "Python 3.11 or newer is needed and none was found (tried python3, python3.11 ... python3.14)." \
        "Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# Debian and Ubuntu ship Python without the part that puts pip into a new environment.
ensure_ensurepip() {
    local python=$1 package as_root=()
    "$python" -c 'import ensurepip' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    [[ $EUID -eq 0 ]] || as_root=(sudo -n)
    if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
        echo "Installing Debian's $package: this Python cannot make environments without it."
        "${as_root[@]}" apt-get -qq update
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$package" >/dev/null
    else
        venv_fail "$python cannot make environments: its ensurepip is missing." \
            "Type: sudo apt-get install $package     then run this again."
    fi
}

# Two runs at once would break each other's installation: the second waits.
ensure_venv() {
    local extras=$1 venv=${2:-.venv} form=${3:-link} stamp wanted
    mkdir -p "$venv"
    exec 9>"$venv/.lock"
    if ! flock -n 9; then
        echo "Another installation into $venv is running; waiting for it."
        flock 9
    fi
    stamp=$venv/.installed-$extras
    wanted=$(cat pyproject.toml constraints.txt | sha256sum)
    if [[ -x $venv/bin/launcher && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        echo "Packages are already installed in $venv."
    else
        install_packages "$extras" "$venv" "$form"
        echo "$wanted" >"$stamp"
    fi
    if [[ $form == copy ]]; then install_copy "$venv"; fi
    exec 9>&-
}

install_packages() {
    local extras=$1 venv=$2 form=$3 python torch package=".[$1]"
    python=$(find_python)
    ensure_ensurepip "$python"
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    torch=$(grep '^torch==' constraints.txt)
    echo "Installing $torch and the packages pinned in constraints.txt (several hundred megabytes, once) ..."
    # torch by its exact version first: a range would let pip prefer a newer, larger build.
    "$venv/bin/python" -m pip install -qq --root-user-action=ignore "$torch" -c constraints.txt
    if [[ $form == link ]]; then package="-e .[$extras]"; fi
    # shellcheck disable=SC2086  # "-e" and its value
    "$venv/bin/python" -m pip install -qq --root-user-action=ignore -c constraints.txt hatchling $package
}

# What changed since the last call is only our own code: no index is asked, nothing is resolved.
install_copy() {
    "$1/bin/python" -m pip install -qq --root-user-action=ignore --no-deps --no-build-isolation --force-reinstall .
}
