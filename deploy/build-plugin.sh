#!/bin/sh
# Builds build/plugin (rootfs and config.json), as `docker plugin create NAME build/plugin` wants it.
# BASE names the base image; DOCKER_HOST the engine that builds.
set -eu
cd "$(dirname "$0")/.."
python=$(.venv/bin/python -c "import sys; print('%d.%d' % sys.version_info[:2])")  # the wheels are made for this one
base=${BASE:-python:$python-slim}
rm -rf build/plugin build/wheels
mkdir -p build/wheels build/plugin/rootfs
.venv/bin/python -m pip wheel --quiet --wheel-dir build/wheels .
docker build --quiet --network none --build-arg "BASE=$base" --tag weft-rootfs . >/dev/null
container=$(docker create weft-rootfs)
docker export "$container" | tar -x -C build/plugin/rootfs
docker rm "$container" >/dev/null
cp config.json build/plugin/
du -sh build/plugin/rootfs | sed 's/\t.*/ unpacked/'
echo "next: docker plugin create weft:latest build/plugin && docker plugin enable weft:latest"
