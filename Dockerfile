# The server as an image: a virtual environment on a small Python base, started as its process 1 by a user without rights.
# docs/container.md says how it is built, run and upgraded; scripts/container.sh builds and tries it without an engine.
#
#   docker build --build-arg VARIANT=cpu  -t serverlesslora:cpu  .
#   docker build --build-arg VARIANT=cuda -t serverlesslora:cuda .
#
# Where packages come from is the builder's business and stays out of the image: a pip.conf and a file of certificates
# may be handed over as the build secrets `pip.conf` and `ca.crt`.

ARG VARIANT=cpu
# Any base with Python 3.11 on the path. torch's own wheels bring CUDA: a CUDA base would bring it a second time.
ARG BASE=python:3.11-slim-bookworm

# --- what the server needs, without the server: this stage changes only when pyproject.toml or the versions do ---
# Bytecode is compiled here, because nothing can be written later, and never compared with its source's time, which
# copying from stage to stage changes: with stale bytecode every start compiles its libraries again. `-f` also replaces
# what the check of torch wrote.
FROM ${BASE} AS dependencies
ARG VARIANT
# As in the Makefile. The CPU build is named in full: a missing one should fail, not become gigabytes of CUDA.
ARG TORCH=2.13.0
# Optional features by their names in pyproject.toml, such as "otel s3".
ARG EXTRAS=""
SHELL ["/bin/sh", "-euc"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_WARN_SCRIPT_LOCATION=1
RUN apt-get update -qq; \
    apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null; \
    python3.11 -c 'import ensurepip' 2>/dev/null \
        || apt-get install -y -qq --no-install-recommends python3.11-venv >/dev/null; \
    useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/serverlesslora \
        --shell /usr/sbin/nologin serverlesslora; \
    python3.11 -m venv /build; \
    python3.11 -m venv --without-pip /opt/serverlesslora
WORKDIR /source
COPY pyproject.toml deploy/constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    if [ -s /run/ca.crt ]; then export PIP_CERT=/run/ca.crt; fi; \
    case "$VARIANT" in \
        cpu) torch="$TORCH+cpu" extras="$EXTRAS" ;; \
        cuda) torch="$TORCH" extras="cuda $EXTRAS" ;; \
        *) echo "VARIANT is $VARIANT; it must be cpu or cuda" >&2; exit 1 ;; \
    esac; \
    /build/bin/python -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *(r for e in sys.argv[1:] for r in project["optional-dependencies"][e]), sep="\n")' \
        $extras > requirements.txt; \
    /build/bin/pip --python /opt/serverlesslora/bin/python install --quiet --no-compile \
        "torch==$torch" -r requirements.txt -c constraints.txt; \
    /opt/serverlesslora/bin/python -c 'import sys, torch; \
built = "cuda" if torch.version.cuda else "cpu"; \
sys.exit(0 if built == sys.argv[1] else f"torch {torch.__version__} is a build for {built}, asked was {sys.argv[1]}")' \
        "$VARIANT"; \
    cd /opt/serverlesslora/lib/python3.11/site-packages; \
    rm -rf torch/include torch/share torch/test; \
    find torch/bin -type f ! -name torch_shm_manager -delete; \
    { /opt/serverlesslora/bin/python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash . >/dev/null \
        || true; }  # libraries bring templates and files for other Pythons

# --- the server: its wheel, installed beside the virtual environment, and its kernels compiled ---
FROM dependencies AS application
COPY README.md LICENSE ./
COPY serverlesslora serverlesslora
COPY ipc ipc
COPY kernels kernels
COPY loadgen loadgen
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    if [ -s /run/ca.crt ]; then export PIP_CERT=/run/ca.crt; fi; \
    /build/bin/pip wheel --quiet --no-deps --wheel-dir /wheel .; \
    /build/bin/pip --python /opt/serverlesslora/bin/python install --quiet --no-compile --no-deps --no-index \
        --prefix /application /wheel/serverlesslora-*.whl; \
    /opt/serverlesslora/bin/python -m compileall -q --invalidation-mode unchecked-hash /application; \
    export PYTHONPATH=/application/lib/python3.11/site-packages PYTHONDONTWRITEBYTECODE=1; \
    /opt/serverlesslora/bin/python -m serverlesslora_kernels.native --portable; \
    mkdir -p /state/huggingface; \
    chmod -R a+rX /application

# --- what is shipped: no compiler, no pip, no sources ---
FROM ${BASE} AS runtime-cpu

# Triton compiles the stubs that launch its kernels with the system's C compiler, when a kernel is first used.
FROM ${BASE} AS runtime-cuda
ARG VARIANT
RUN if [ "$VARIANT" = cuda ]; then \
        apt-get update -qq \
        && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null \
        && { [ -e "$(python3.11 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
            || apt-get install -y -qq --no-install-recommends libpython3.11-dev >/dev/null; } \
        && rm -rf /var/lib/apt/lists/*; \
    fi
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-${VARIANT}
ARG VARIANT
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="serverlesslora" \
    org.opencontainers.image.description="Serverless multi-LoRA inference: isolated functions, one read-only backbone" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    serverlesslora.variant="${VARIANT}"
COPY --from=dependencies /etc/passwd /etc/group /etc/
COPY --from=dependencies /opt/serverlesslora /opt/serverlesslora
COPY --from=application /application /opt/serverlesslora
COPY deploy/server.toml /etc/serverlesslora/server.toml
COPY --from=application --chown=10001:10001 /state /var/lib/serverlesslora

# The root file system may be read-only: what is written goes to the state volume, or to /tmp (a tmpfs).
ENV PATH=/opt/serverlesslora/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/serverlesslora \
    HF_HOME=/var/lib/serverlesslora/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/var/lib/serverlesslora/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    XDG_CACHE_HOME=/tmp/cache \
    SERVERLESSLORA_CONFIG=/etc/serverlesslora/server.toml \
    SERVERLESSLORA_STATE_DIR=/var/lib/serverlesslora \
    SERVERLESSLORA_HOST=0.0.0.0 \
    SERVERLESSLORA_PORT=8000 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/serverlesslora
VOLUME /var/lib/serverlesslora
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health answers as soon as the gateway listens, however long a backbone takes to load.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["/opt/serverlesslora/bin/serverlesslora", "healthcheck"]
# Exec form: the server itself is process 1 and SIGTERM reaches it. The admin API stays on the container's 127.0.0.1.
ENTRYPOINT ["/opt/serverlesslora/bin/serverlesslora"]
CMD ["serve"]
