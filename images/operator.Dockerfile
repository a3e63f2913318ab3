# The operator: no torch, no vLLM. Build from the repository's root:
#   docker build -f images/operator.Dockerfile -t sere-operator:0.1.0 .
# Tests make the same content without a daemon (tests/kit/images.py).
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY requirements/operator.lock requirements/operator.lock
RUN pip install --no-cache-dir --target /opt/sere -r requirements/operator.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY sere_ext sere_ext
COPY autotune autotune
COPY operator operator
RUN pip install --no-cache-dir --no-deps --target /opt/sere .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --home-dir /tmp --shell /usr/sbin/nologin sere
COPY --from=build /opt/sere /opt/sere
# Python's images hold no byte code of the standard library, and under a read-only root every start would compile it anew.
# By content (-f): a time stamp may change on the way. Modules of other Pythons' syntax do not compile, and are not imported.
RUN python3 -m compileall -qqf --invalidation-mode unchecked-hash /usr/local/lib/python3.11 /opt/sere || true
ENV PYTHONPATH=/opt/sere PATH=/opt/sere/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp LANG=C.UTF-8
USER 10001
ENTRYPOINT ["python3", "-m", "sere_operator.runtime.main"]
