# Engine and tuner on CUDA, one image: the tuner starts engines. Build from the repository's root:
#   docker build -f images/engine.Dockerfile -t sere-engine:0.1.0 .
# Another vLLM between 0.26 and 0.33: --build-arg VLLM=v0.31.0
# The kernel has not yet run on a GPU (docs/results.md).
ARG VLLM=v0.32.0
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu22.04 AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3
COPY sere_ext /src
RUN PYTHONPATH=/src python3 -m sere_ext.routing.build cpu cuda --out /opt/sere/kernels

FROM vllm/vllm-openai:${VLLM}
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY sere_ext sere_ext
COPY autotune autotune
COPY operator operator
# vLLM is there already; the tuner's dependencies come with the extra.
RUN pip install --no-cache-dir ".[autotune]" && useradd --uid 10001 --home-dir /tmp --shell /usr/sbin/nologin sere
COPY --from=kernels /opt/sere/kernels /opt/sere/kernels
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp SERE_BUILD_DIR=/opt/sere/kernels
WORKDIR /tmp
USER 10001
ENTRYPOINT ["sere"]
