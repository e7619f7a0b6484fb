# The GPU image. Build: docker build -t serving-gateway .
# Run:   docker run --gpus all --shm-size 2g -p 8000:8000 -v serving:/var/lib/serving \
#          -v ./serving.yaml:/etc/serving/serving.yaml:ro serving-gateway
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# The base image's tag fixes the distribution; a pinned package version would break with its next
# security update. tini reaps the children that Ray leaves to process 1.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home serving \
    && install -d -o serving -g serving /var/lib/serving

WORKDIR /app
ENV VENV=/opt/venv EXTRAS="" PIP_NO_CACHE_DIR=1

# The dependencies come before the code that changes often, so that a build reuses their layer.
COPY pyproject.toml constraints.txt README.md ./
COPY .ci/setup .ci/setup
COPY serving/__init__.py serving/__init__.py
RUN .ci/setup

COPY serving serving
COPY configs/container.yaml /etc/serving/serving.yaml

ENV PATH=/opt/venv/bin:$PATH \
    SERVING_HOME=/var/lib/serving \
    PYTHONUNBUFFERED=1
# By number, so that a cluster can see that it is not root.
USER 10001:10001
VOLUME /var/lib/serving
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]

ENTRYPOINT ["tini", "--", "serving"]
CMD ["up", "-f", "/etc/serving/serving.yaml"]
