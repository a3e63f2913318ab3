"""An API server that does not answer: one line for the user, without the words of the HTTP library."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from sere_operator.cli import kubectl

CONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: a, cluster: {{server: "{server}"}}}}]
contexts: [{{name: a, context: {{cluster: a, user: a}}}}]
current-context: a
users: [{{name: a, user: {{token: x}}}}]
"""


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ("https://127.0.0.1:{closed}", "Connection refused"),
        ("http://127.0.0.1:{closed}", "Connection refused"),
        ("http://127.0.0.1:{silent}", "it took too long"),
        ("https://no-such-host.invalid:6443", "Name or service not known"),
    ],
)
def test_an_unreachable_cluster_is_one_line(
    server: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = socket.getaddrinfo

    def resolve(
        host: Any, *arguments: Any, **options: Any
    ) -> Any:  # as a name server says it; without one other words would stand there
        if str(host).endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolved(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server = server.format(closed=closed.getsockname()[1], silent=silent.getsockname()[1])
        (tmp_path / "config").write_text(CONFIG.format(server=server))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
        monkeypatch.setattr("sere_operator.cli.cluster.TIMEOUT_S", 0.3)
        monkeypatch.setattr("sys.argv", ["kubectl-sere", "explain", "m"])
        with pytest.raises(SystemExit) as ended:
            kubectl.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"kubectl sere: the API server at {server} does not answer: {told}; check that the cluster runs, and KUBECONFIG and --context\n"
    )
