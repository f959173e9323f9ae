# Two images of one distribution:
#   docker build --target runtime -t modelcache .          the operator, the Jobs and the server: no torch
#   docker build --target client -t modelcache-client .    the client library with torch and transformers
# PYTHON is any image with Python 3.11 or later, its venv module and the C library that wheels are built for (glibc).
# PIP_FIND_LINKS is a folder mounted into the build, or a page, with wheels to prefer, such as a build of torch without CUDA.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS python
RUN python3 -m venv /opt/modelcache
ENV PATH=/opt/modelcache/bin:$PATH

# --- What the packages depend on: layers that change only when the lists do, not with every line of pyproject.toml
FROM python AS requirements
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    [open(name + '.txt', 'w').write('\n'.join([*project['dependencies'], *(line for extra in wanted.split(',') for line in extras.get(extra, []))])) \
     for name, wanted in (argument.split('=') for argument in sys.argv[1:])]" \
    runtime=server,fetch,operator client=torch

FROM python AS pip
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# (each stage names the arguments that it uses: not every builder hands them on)
FROM pip AS runtime-requirements
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
COPY --from=requirements /src/runtime.txt /src/constraints.txt ./
RUN pip install --constraint constraints.txt --requirement runtime.txt && pip uninstall --yes pip setuptools

FROM pip AS client-requirements
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
COPY --from=requirements /src/client.txt /src/constraints.txt ./
RUN pip install --constraint constraints.txt --requirement client.txt && pip uninstall --yes pip setuptools

# --- The packages themselves: a small layer, laid over the other
FROM pip AS package
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
COPY . .
RUN pip install --no-deps --prefix /opt/modelcache --root /package .

FROM python AS base
LABEL org.opencontainers.image.title="ModelCache" \
      org.opencontainers.image.description="Keeps model weights in the cluster: fetched once, verified, served at wire speed" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /tmp
# A number, so that `runAsNonRoot` can be checked without reading /etc/passwd.
USER 65532:65532

FROM base AS runtime
COPY --from=runtime-requirements /opt/modelcache /opt/modelcache
COPY --from=package /package/opt/modelcache /opt/modelcache
CMD ["modelcache", "--help"]

FROM base AS client
COPY --from=client-requirements /opt/modelcache /opt/modelcache
COPY --from=package /package/opt/modelcache /opt/modelcache
CMD ["python3"]
