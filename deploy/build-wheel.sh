#!/bin/sh
# Builds weft's wheel into FOLDER from the last commit: the same bytes whenever and wherever it is built with the same
# setuptools. WHEEL_PYTHON is one with pip.
set -eu
umask 022
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=$(command -v "${WHEEL_PYTHON:-.venv/bin/python}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' plugin/weft/__init__.py)
for tag in $(git tag --points-at HEAD 'v*'); do
    [ "$tag" = "v$version" ] || { echo "the commit has the tag $tag, and weft.__version__ is $version" >&2; exit 1; }
done

SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
git -c tar.umask=0022 archive HEAD | tar -x -C "$source" # neither what is not committed, nor what an earlier build left
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$source"
