# The managed plugin's file system. BASE is any Debian-like image with python3 >= 3.11 and venv; with a folder of wheels in
# build/wheels (make plugin puts them there) the build needs no network.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY . /src
RUN python3 -m venv /opt/weft \
 && /opt/weft/bin/pip install --no-cache-dir --no-index --find-links /src/build/wheels weft \
 && /opt/weft/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
COPY --from=build /opt/weft /opt/weft
RUN mkdir -p /var/lib/weft /propagated
ENTRYPOINT ["/opt/weft/bin/weft", "serve"]
