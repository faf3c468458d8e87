# The service with everything it needs to run jobs: docker build -t narrow . && docker run -p 8000:8000 -v narrow:/data narrow
# Which build of torch comes (CPU or CUDA) is decided by TORCH_INDEX; --target ray makes the image of a Ray cluster's nodes.
FROM python:3.11-slim AS build
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/narrow
ENV PATH=/opt/narrow/bin:$PATH
WORKDIR /src
COPY requirements.lock ./
RUN pip install "torch==${TORCH_VERSION}" --index-url "${TORCH_INDEX}" && pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY narrow_engine narrow_engine
COPY service service
RUN pip install --no-deps ./client .

FROM python:3.11-slim AS base
RUN useradd --system --create-home --uid 10001 narrow && install -d -o narrow -g narrow /data
COPY --from=build /opt/narrow /opt/narrow
ENV PATH=/opt/narrow/bin:$PATH PYTHONUNBUFFERED=1 NARROW_DATA=/data
USER 10001
VOLUME /data

FROM base AS ray
ARG RAY_VERSION=2.60.0
USER 0
# KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "ray[default]==${RAY_VERSION}"
USER 10001

FROM base
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["narrow", "serve", "--host", "0.0.0.0", "--port", "8000"]
