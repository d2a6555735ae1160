# weft's image, for the managed plugin (deploy/build-plugin.sh) and for the `weft` command. It holds Python, nft and weft,
# and neither a shell nor a package manager. The same for every architecture: docker buildx build --platform … .
# BASE is any Debian-like image with Python >= 3.11, pip and venv. With the libraries' wheels in build/wheels, and nft in
# the base, nothing is fetched.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN command -v nft || (apt-get update && apt-get install --yes --no-install-recommends nftables)
COPY . /src
RUN python3 -m venv --without-pip /opt/weft \
 && if [ -d /src/build/wheels ]; then set -- --no-index --find-links /src/build/wheels; fi \
 && python3 -m pip --python /opt/weft/bin/python3 install --no-cache-dir --no-compile "$@" /src
RUN sh /src/deploy/image-root.sh /image

FROM scratch
COPY --from=build /image /
ENTRYPOINT ["/opt/weft/bin/weft"]
CMD ["serve"]
