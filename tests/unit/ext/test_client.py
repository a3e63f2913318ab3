"""`sere status` against what is no engine: one sentence, no trace, a fitting exit code."""

import socket
import threading
from collections.abc import Iterator

import pytest

from sere_ext.contract.errors import SereError, UnsupportedError, UsageError
from sere_ext.control.client import get_state


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_listens(free_port: int, scheme: str) -> None:
    with pytest.raises(SereError) as caught:
        get_state(f"{scheme}127.0.0.1:{free_port}/")
    assert str(caught.value) == (
        f"no engine answers at http://127.0.0.1:{free_port} (Connection refused); check that it runs, and its host and port"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("url", ["", "ftp://engine", "http://", "engine:80a", "an engine", "http://engine:99999999"])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError, match=r"is no address of an engine; give one like http://127\.0\.0\.1:8000"):
        get_state(url)


@pytest.fixture
def says() -> Iterator[dict]:
    """Another server: what it answers to everything, and where."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        answer = {"bytes": b"", "at": f"127.0.0.1:{listening.getsockname()[1]}"}

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer["bytes"])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield answer
        thread.join(5)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", SereError, "no engine answers at http://127.0.0.1"),
        (b"", SereError, "no engine answers at http://127.0.0.1"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", UnsupportedError, "no live control"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", UnsupportedError, "is no engine with live control"),
    ],
)
def test_another_server_listens(says: dict, answer: bytes, kind: type[SereError], words: str) -> None:
    says["bytes"] = answer
    with pytest.raises(kind, match=words) as caught:
        get_state(says["at"])
    assert "\n" not in str(caught.value)
