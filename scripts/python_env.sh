# Sourced by scripts/try and scripts/test: finds a Python, makes a virtual environment, installs the project.
#
#   python_env DIR EXTRAS [PYTHON]   leaves the environment's python in $PYTHON_ENV
#
# PYTHON defaults to the newest Python >= 3.12 on PATH, then among pyenv's versions, else python3.
# An environment is made once and brought up to date when pyproject.toml changes.

newest_python() {
  local minor candidate
  for minor in 14 13 12; do
    candidate=$(command -v "python3.$minor" || true)
    if [ -n "$candidate" ] && "$candidate" -c '' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    candidate=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python 2>/dev/null | sort -V | tail -n 1)
    if [ -n "$candidate" ] && "$candidate" -c '' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  command -v python3 || { echo "no python3 on this machine: install Python 3.11 or newer" >&2; return 1; }
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

apt_install() { # PACKAGES...: quiet apt install, or one line that says what to do
  command -v apt-get >/dev/null || { echo "install $* with this system's package manager, then run again" >&2; return 1; }
  echo "installing $* (apt)" >&2
  { as_root apt-get update -qq && as_root apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1 ||
    { echo "could not install $*: run 'apt-get install $*' as root, then run again" >&2; return 1; }
}

python_env() {
  local dir=$1 extras=$2 python stamp
  python=${3:-$(newest_python)} || return 1
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$python is older than Python 3.11: install a newer one" >&2
    return 1
  fi
  PYTHON_ENV=$dir/bin/python
  stamp="$("$python" --version) $extras $(cksum <pyproject.toml)"
  [ "$(cat "$dir/stamp" 2>/dev/null)" = "$stamp" ] && return 0
  echo "setting up $dir with $("$python" --version) (a minute or two, once)" >&2
  "$python" -c 'import ensurepip' 2>/dev/null ||
    apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" || return 1
  "$python" -m venv --clear "$dir" &&
    "$PYTHON_ENV" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" &&
    echo "$stamp" >"$dir/stamp"
}
