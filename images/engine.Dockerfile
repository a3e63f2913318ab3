# Engine and tuner on CUDA, one image: the tuner starts engines. Build from the repository's root:
#   docker build -f images/engine.Dockerfile -t sere-engine:0.1.0 .
# Another vLLM between 0.26 and 0.33: --build-arg VLLM=v0.31.0
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sere_ext sere_ext
COPY autotune autotune
COPY operator operator
# vLLM is there already; the tuner's dependencies come with the extra.
RUN pip install --no-cache-dir ".[autotune]" && useradd --uid 10001 --home-dir /tmp --shell /usr/sbin/nologin sere
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /tmp
USER 10001
ENTRYPOINT ["sere"]
