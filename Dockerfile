# syntax=docker/dockerfile:1
# Images of flare_exp for CPUs and for NVIDIA GPUs (docs/export.md):
#   docker build --target cpu -t flare-exp:cpu .
#   docker build --target cuda -t flare-exp:cuda .
ARG PYTHON=3.11.7-slim-bookworm

FROM python:${PYTHON} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# the wheel, built with pinned tools
FROM base AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt hatchling editables
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY flare_exp flare_exp
RUN python -m hatchling build -t wheel -d /wheels && python -m venv /opt/flare_exp

# PyPI has torch for Linux with CUDA only. Its build for CPUs, which is a tenth of the size, is on PyTorch's own index:
#   docker build --target cpu --build-arg TORCH_INDEX=<index of PyTorch's CPU builds> -t flare-exp:cpu .
FROM wheel AS packages-cpu
ARG TORCH_INDEX
RUN /opt/flare_exp/bin/pip install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch==2.13.0 \
    && /opt/flare_exp/bin/pip install -c constraints.txt /wheels/*.whl

FROM wheel AS packages-cuda
RUN /opt/flare_exp/bin/pip install -c constraints.txt torch==2.13.0 \
    && /opt/flare_exp/bin/pip install -c constraints.txt "$(echo /wheels/*.whl)[ct2]"

# What both images share. Any user may write to /work (runs) and /cache (artifacts, models, data),
# also one that is named by `docker run --user`.
FROM base AS runtime
RUN useradd --uid 1000 --no-create-home --home-dir /cache flare && install -d -m 1777 /work /cache
ENV PATH=/opt/flare_exp/bin:$PATH \
    HOME=/cache \
    FLARE_EXP_CACHE=/cache/flare_exp \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /work
ENTRYPOINT ["flare-exp"]
CMD ["--help"]

FROM runtime AS cuda
# what NVIDIA's container toolkit gives to the container
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/flare_exp /opt/flare_exp

# the last one: what `docker build .` makes
FROM runtime AS cpu
COPY --from=packages-cpu /opt/flare_exp /opt/flare_exp
