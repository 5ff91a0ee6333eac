# syntax=docker/dockerfile:1
# One image for every Ray pod and for `docker run`:
#   docker build -t acestep-serve:0.1.0-cuda .
#   docker build -t acestep-serve:0.1.0-cpu --build-arg VARIANT=cpu .
#   docker run --init --read-only --tmpfs /tmp -v acestep:/var/lib/acestep -v acestep-models:/models -p 8000:8000 acestep-serve:0.1.0-cpu
# NVIDIA's libraries come with torch's wheels, so no CUDA base image is needed; the driver comes from the host. ROCm: see k8s/README.md.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG VARIANT=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Dependencies first: they change less often than the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY acestep/__init__.py acestep/__init__.py
RUN mkdir deployments \
 && touch deployments/__init__.py \
 && case "$VARIANT" in \
      cuda) pip install --constraint constraints.txt ".[gpu,postgres,s3,wavelets]" ;; \
      cpu) pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu ".[postgres,s3,wavelets]" ;; \
      *) echo "VARIANT must be cuda or cpu, not $VARIANT" >&2; exit 1 ;; \
    esac
COPY acestep acestep
COPY deployments deployments
COPY serve_config.yaml ./
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON}
ARG VARIANT=cuda
# KubeRay probes workers with bash, wget and grep. Triton, which torch.compile uses on a card, builds its launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes bash grep wget \
 && if [ "$VARIANT" = cuda ]; then apt-get install --no-install-recommends --yes gcc libc6-dev; fi \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 acestep \
 && useradd --uid 1000 --gid 1000 --home-dir /var/lib/acestep --shell /bin/bash acestep \
 && install --directory --owner 1000 --group 0 --mode 2775 /var/lib/acestep /models
COPY --from=build /opt/venv /opt/venv
COPY k8s/base/serve_config.yaml /opt/acestep/serve_config.yaml
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/acestep-entrypoint
# USER and LOGNAME: torch asks for a user's name, which an arbitrary uid does not have.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/var/lib/acestep \
    USER=acestep \
    LOGNAME=acestep \
    ACESTEP_HOME=/var/lib/acestep \
    ACESTEP_CHECKPOINTS=/models \
    HF_HOME=/models/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.ingress.proxy:middlewares \
    RAY_USAGE_STATS_ENABLED=0
# Jobs and songs; checkpoints, which are not to be downloaded again by each container: name both with -v to keep them.
VOLUME ["/var/lib/acestep", "/models"]
USER 1000:1000
WORKDIR /opt/acestep
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/livez"]
ENTRYPOINT ["acestep-entrypoint"]
CMD ["serve"]
