#!/bin/sh
# build-plugin.sh [OPTION OF docker build]...
# Builds build/plugin (rootfs and config.json), as `docker plugin create NAME build/plugin` wants it, and the same as a
# tar file whose digest depends on the source and the versions of the libraries only.
#
# DOCKER_HOST        the engine that builds; by default this machine's
# BASE               the base image (see Dockerfile)
# OFFLINE=1          the wheels come from this machine's pip, in the versions that .venv has, and the build has no network
# SOURCE_DATE_EPOCH  the time that all files get; the last commit's if not given
set -eu
umask 022
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' plugin/weft/__init__.py)
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}"

collect_wheels() {
    { .venv/bin/python -V | sed 's/^/# /'; .venv/bin/python -m pip freeze --exclude-editable; } >build/constraints.txt
    if ! cmp -s build/constraints.txt build/wheels/constraints.txt; then
        rm -rf build/wheels
        .venv/bin/python -m pip wheel --quiet --wheel-dir build/wheels --constraint build/constraints.txt . setuptools
        rm -f build/wheels/weft-*
        cp build/constraints.txt build/wheels/
    fi
}

rm -rf build/plugin
mkdir -p build/plugin/rootfs
if [ -n "${OFFLINE:-}" ]; then
    collect_wheels
    set -- --network none "$@"
else
    rm -rf build/wheels
fi
DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} docker build --quiet "$@" ${BASE:+--build-arg "BASE=$BASE"} --tag "weft:$version" . >/dev/null
container=$(docker create "weft:$version")
docker export "$container" | tar -xp -C build/plugin/rootfs
docker rm "$container" >/dev/null
cp config.json build/plugin/
chmod 644 build/plugin/config.json
find build/plugin -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +

architecture=$(docker version --format '{{.Server.Arch}}')
tar=build/weft-plugin-$version-$architecture.tar.gz
tar -C build/plugin --sort=name --format=gnu --owner=0 --group=0 --numeric-owner -c config.json rootfs | gzip -n >"$tar"
du -sm build/plugin/rootfs | sed 's/\t.*/ MB unpacked/'
sha256sum "$tar"
echo "next: docker plugin create weft:$version build/plugin && docker plugin enable weft:$version"
