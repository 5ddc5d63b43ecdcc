# Lorica as a service. `docker build .` has the CPU build of torch; for NVIDIA GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --build-arg TORCH_LOCAL= .
ARG PYTHON=3.12
ARG NODE=22

# The charts of the dashboard come from the npm registry; their digest is checked when they are unpacked.
FROM node:${NODE}-slim AS charts
WORKDIR /charts
RUN npm pack uplot@1.6.32 --ignore-scripts --silent

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_LOCAL=+cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lorica
ENV PATH=/opt/lorica/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
RUN pip install "$(grep '^torch==' constraints.txt)${TORCH_LOCAL}" --index-url "${TORCH_INDEX}"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[serve,s3]"
COPY --from=charts /charts/ /charts/
RUN python -m lorica.server.assets /charts/uplot-1.6.32.tgz

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="Lorica" org.opencontainers.image.licenses="Apache-2.0"
# an engine on a CPU compiles its kernels for the very processor that it runs on
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 lorica && install -d -o lorica -g lorica /data
COPY --from=build /opt/lorica /opt/lorica
ENV PATH=/opt/lorica/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
USER lorica
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=4 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# SIGTERM drains: what the engines have is finished, and the state of every run is written
STOPSIGNAL SIGTERM
ENTRYPOINT ["lorica"]
CMD ["serve", "--host", "0.0.0.0", "--data-dir", "/data", "--log-json", "--model", "nano"]
