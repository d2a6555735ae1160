# weft's image, for the managed plugin (deploy/build-plugin.sh) and for the `weft` command. It holds Python, nft and weft,
# and neither a shell nor a package manager. The same for every architecture: docker buildx build --platform … .
# BASE is any Debian-like image with python3 >= 3.11 and venv. With wheels in build/wheels, and nft in the base, nothing
# is fetched.
ARG BASE=python:3.13-slim-trixie

FROM ${BASE} AS build
RUN command -v nft || (apt-get update && apt-get install --yes --no-install-recommends nftables)
COPY . /src
RUN python3 -m venv /opt/weft \
 && if [ -d /src/build/wheels ]; then set -- --no-index --find-links /src/build/wheels weft; else set -- /src; fi \
 && /opt/weft/bin/pip install --no-cache-dir --no-compile "$@" \
 && /opt/weft/bin/pip uninstall --yes pip setuptools
RUN sh /src/deploy/image-root.sh /image

FROM scratch
COPY --from=build /image /
ENTRYPOINT ["/opt/weft/bin/weft"]
CMD ["serve"]
