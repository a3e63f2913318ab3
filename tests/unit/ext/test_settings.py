"""How the plug-in is configured, and what `sere serve` prepares and refuses before anything is loaded."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from sere_ext.cli.serve import check_config, check_model, check_port, environment, every_address, one_server, option
from sere_ext.contract.errors import PolicyError, SimilarityError, UnsupportedError, UsageError
from sere_ext.contract.policy import Policy
from sere_ext.engine.settings import Settings, resolve
from sere_ext.engine.versions import check_engine_version
from sere_ext.similarity.hub import asked_model_config, why_not_on_hub

TOPK: dict[str, Any] = {"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]}


def profile(similarity: str | None = None) -> dict[str, Any]:
    paired = {"exact": 1.0, "chosen": 1.0}
    accuracy = {"exact": 1, "chosen": 1, "items": 1, "maxDropPoints": 1, "confidence": 0.95, "dropPoints": 0,
                "discordantShare": 0, "noiseFloor": 0}  # fmt: skip
    spec: dict[str, Any] = {
        "policy": TOPK,
        "key": {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"},
        "evidence": {"certified": True, "tpotMs": paired, "speedup": {"value": 1, "condition": "x"}, "accuracy": accuracy},
    }
    if similarity:
        spec["similarity"] = {"uri": similarity, "digest": "sha256:0"}
    return {"apiVersion": "serving.sere.dev/v1alpha1", "kind": "SereProfile", "metadata": {}, "spec": spec}


def test_inert_until_configured() -> None:
    assert resolve({}, {}) is None
    assert resolve({"other": 1}, {"VLLM_PLUGINS": "sere"}) is None


def test_each_source_configures_and_the_engine_argument_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile("file://sim.safetensors")))
    exact = Settings()
    assert resolve({"sere": {}}, {}) == exact
    assert resolve({}, {"SERE_POLICY_DIR": "/etc/sere"}) == exact
    assert resolve({}, {"VLLM_PLUGINS": "a,sere,sere_control"}) == exact
    assert resolve({"sere": {"policy": TOPK, "similarity": "s"}}, {"SERE_PROFILE": str(path)}) == Settings(
        Policy.parse(TOPK), "s"
    )
    assert resolve({"sere": {"policy": str(path)}}, {}) == Settings(Policy.parse(TOPK))
    from_profile = resolve({}, {"SERE_PROFILE": str(path)})
    assert from_profile is not None
    assert from_profile.policy == Policy.parse(TOPK)
    assert from_profile.key is not None


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///data/a.safetensors", "/data/a.safetensors"),
        ("file:a.safetensors", "HERE/a.safetensors"),
        ("file://a.safetensors", "HERE/a.safetensors"),
    ],
)
def test_a_profiles_similarity_is_absolute_or_beside_it(tmp_path: Path, uri: str, path: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(profile(uri)))
    settings = resolve({}, {"SERE_PROFILE": str(file)})
    assert settings is not None
    assert settings.similarity == path.replace("HERE", str(tmp_path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sere": {"polcy": {}}}, "no setting polcy"),
        ({"sere": [1]}, "should be an object"),
        ({"sere": {"policy": "/nowhere.json"}}, "cannot read the policy /nowhere.json"),
        ({"sere": {"policy": {"buckets": [{"minTokens": 1, "kind": "sere", "S": 1, "rho": 7}]}}}, "(got 7"),
        ({"sere": {"policy": {"buckets": [{"minTokens": 1, "kind": "topk"}]}}}, "needs S"),
    ],
)
def test_bad_settings_are_refused_with_the_field(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(config, {})
    assert says in str(caught.value)


def test_serve_names_our_plugins_and_keeps_the_users() -> None:
    assert environment({"VLLM_PLUGINS": "mine"}, ["x"])["VLLM_PLUGINS"] == "mine,sere,sere_control"
    assert environment({"A": "1"}, ["lora", "sere"]) == {"A": "1", "VLLM_PLUGINS": "lora,sere,sere_control"}


def test_serve_reads_options_as_vllm_does() -> None:
    assert option(["m", "--port", "1", "--port=2"], "--port") == "2"
    assert option(["m"], "--port") is None


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["m"], []),
        (["m", "--data-parallel-size", "2"], ["--api-server-count", "1"]),
        (["m", "-dp=2"], ["--api-server-count", "1"]),
        (["m", "--data-parallel-size", "2", "--headless"], []),
        (["m", "--data-parallel-size", "2", "--api-server-count", "1"], []),
    ],
)
def test_serve_starts_a_single_api_server(given: list[str], added: list[str]) -> None:
    assert one_server(given) == [*given, *added]
    with pytest.raises(UsageError, match="leave the option out"):
        one_server([*given, "--api-server-count=3"])


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} cannot be used on 127.0.0.1:{port}"):
            check_port(["m", "--host", "127.0.0.1", "--port", str(port)])
    check_port(["m", "--host", "127.0.0.1", "--port", "0"])
    with pytest.raises(UsageError, match="--port http is no port"):
        check_port(["m", "--port", "http"])


@pytest.mark.parametrize("given", [["/none/model"], ["./none"], ["runs/a/model"], ["--model", "~/none", "--port", "1"]])
def test_a_folder_that_is_not_there_is_said_and_not_asked_of_the_hub(given: list[str]) -> None:
    with pytest.raises(UsageError, match=r"there is no folder \S+ \(from .*\); check its spelling"):
        check_model(given)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "no-such-model",
            r"there is no folder no-such-model \(from .*\), and HF_HUB_OFFLINE keeps it from being looked for on the hub",
        ),
        ("no/such", r"check its spelling, or download it first \(hf download no/such\)$"),
        ("a b", r"and no model of the hub can have that name; check its spelling$"),
        ("{folder}", r"is a folder without config.json.*, so it holds no model; give the folder with the model's"),
        ("{folder}/file", r"is a file; give the folder of the model that it belongs to$"),
        ("{folder}/none", r"there is no folder .*none \(from .*\); check its spelling$"),
    ],
)
def test_a_name_that_is_no_model_is_one_sentence_of_ours(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In `sere serve`, `sere calibrate` and (by `asked_model_config`) `sere tune` alike, without the hub's own words."""
    (tmp_path / "file").write_text("")
    model = name.format(folder=tmp_path)
    for ask in (lambda: check_model([model]), lambda: asked_model_config(model)):
        with pytest.raises(UsageError, match=told) as refused:
            ask()
        assert "\n" not in str(refused.value) and "Repo id" not in str(refused.value)
    assert capsys.readouterr().err == ""


def test_an_address_and_a_broken_configuration_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="http://host/m is an address; give a model's folder"):
        asked_model_config("http://host/m")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json cannot be read as JSON"):
        asked_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="holds no JSON object"):
        asked_model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("GatedRepoError", "the hub gives a/b to those only who accepted its terms"),
        ("RepositoryNotFoundError", "and the hub has no such model for you; check its spelling, or run hf auth login"),
        ("RevisionNotFoundError", "the hub's a/b has no revision v9; check its spelling, or leave it out"),
        ("RemoteEntryNotFoundError", "the hub's a/b has no config.json"),
        ("LocalEntryNotFoundError", "and the hub cannot be reached to look for it there; check its spelling and the network"),
    ],
)
def test_what_the_hub_says_is_told_in_our_words(raised: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    kind = getattr(errors, raised)
    wrapped = OSError("many words")
    wrapped.__cause__ = kind.__new__(kind)
    assert told in why_not_on_hub("a/b", "v9", wrapped)


def test_folders_of_models_and_names_that_only_vllm_reads_are_left_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.json").write_text("{}")
    for given in ([str(tmp_path)], ["s3://bucket/a/model"], ["a/b:Q4_K_M"], ["--port", "1"], []):
        check_model(given)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "config.json")
    check_model(["Qwen/Qwen3-30B-A3B"])


def test_serve_refuses_bad_settings_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read as JSON .* write an object in quotes"):
        check_config(["--additional-config", "{"])
    buckets = [{"minTokens": 1, "maxTokens": 9, "kind": "exact"}, {"minTokens": 9, "kind": "exact"}]
    with pytest.raises(PolicyError, match="overlap"):
        check_config([f"--additional-config={json.dumps({'sere': {'policy': {'buckets': buckets}}})}"])
    with pytest.raises(SimilarityError, match="no similarity file"):
        check_config(["--additional-config", json.dumps({"sere": {"similarity": str(tmp_path / "x")}})])
    check_config(["m", "--additional-config", json.dumps({"sere": {"policy": TOPK}})])


@pytest.mark.parametrize(
    ("version", "device", "ok"),
    [
        ("0.32.0", "cpu", True), ("0.33.1", "cuda", True), ("0.26.0", "cuda", True), ("0.34.0", "cuda", False),
        ("0.31.2", "cpu", False), ("0.25.9", "cuda", False), ("1.0", "cpu", False), ("dev", "cpu", False),
    ],
)  # fmt: skip
def test_an_engine_version_that_was_never_tried_is_refused_with_the_range(version: str, device: str, ok: bool) -> None:
    if ok:
        check_engine_version(version, device)
        return
    with pytest.raises(UnsupportedError, match=f"vLLM {version} on {device} is outside the range.*install a vLLM in that range"):
        check_engine_version(version, device)


def test_without_a_host_every_address_is_served_where_the_kernel_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv6-only clusters have no other; a kernel without IPv6 must not end in an error."""
    assert every_address(["m", "--host", "127.0.0.1"]) == []
    assert every_address(["m", "--uds=/tmp/s"]) == []
    found = every_address(["m"])
    if found:
        host = found[1]
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:  # as vLLM makes it
            server.bind((host, 0))
            server.listen()
            for address in ("127.0.0.1", "::1"):
                socket.create_connection((address, server.getsockname()[1]), timeout=5).close()

    def no_ipv6(*args: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_ipv6)
    assert every_address(["m"]) == []
