"""A real node with the operator installed by the real helm. Started by tests/kit/cluster-rung, or a cluster of SERE_KUBECONFIG.

Engines are few: two cores carry two at a time, and each takes about a minute to start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import site
from tests.kit import ROOT

SITE = site.current()
NAMESPACE = SITE.namespace
ITEMS = 1500  # certify a limit of 2 points
BROKEN: dict[str, str] = {}  # by file: the test that ended its story


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The tests of a file are one story: what comes after a failure would only wait for what cannot happen any more."""
    if culprit := BROKEN.get(item.path.name):
        pytest.skip(f"{culprit} failed, and this test goes on from it")


@pytest.fixture(scope="session")
def node() -> None:
    """A cluster to test on, or one line on what is missing."""
    if not os.environ.get("KUBE_DIR") and not os.environ.get("SERE_KUBECONFIG"):
        why = (
            "no cluster: run tests/kit/cluster-rung, which starts one (root, containerd and Kubernetes binaries needed), "
            "or name yours with SERE_KUBECONFIG and SERE_IMAGES"
        )
        if os.environ.get("SERE_REQUIRE_RUNGS") == "1":
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="session")
def data(node: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder behind the claim `data`: a small model to serve; a widened one to tune, its items and calibration text."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(ROOT / "tests/assets/tiny_moe", folder / "small")
    commands = [["widen", str(ROOT / "tests/assets/rows_moe"), str(folder / "model")]]
    for name, split, count in (("items", "eval", ITEMS), ("calib", "calibration", 256)):
        options = ["--split", split, "--count", str(count), "--seed", "5", "--out", str(folder / f"{name}.jsonl")]
        commands.append(["items", "--model", "rows_moe", *options])
    for script, *options in commands:
        command = [sys.executable, "-m", f"tests.assets.make.{script}", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def prompts(data: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in (data / "calib.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def operator(data: Path) -> Iterator[None]:
    """The chart, installed; a namespace that enforces restricted pods, with the data; the operator's log is kept."""
    try:
        SITE.install()
        SITE.prepare({"data": data})
        yield
        log = subprocess.run(
            ["kubectl", "logs", "-n", SITE.system, "deploy/sere-operator", "--tail=-1"],
            capture_output=True,
            text=True,
            check=False,
        )
        folder = ROOT / "build" / "test" / "cluster"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "operator.log").write_text(log.stdout + log.stderr)
    finally:
        SITE.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Say what the cluster looked like when a test failed."""
    report = yield
    if report.failed:
        BROKEN.setdefault(item.path.name, item.name)
    if report.when == "call" and report.failed:
        for title, command in {
            "objects": ("get", "sere,seretune,sereprof,job,pod", "-n", NAMESPACE, "-o", "wide"),
            "status": ("get", "sere,seretune", "-n", NAMESPACE, "-o", "jsonpath={range .items[*]}{.status}{'\\n'}{end}"),
            "operator": ("logs", "-n", SITE.system, "deploy/sere-operator", "--tail=20"),
            "engine": ("logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=engine", "--tail=25"),
            "tuner": ("logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=tuner", "--tail=40"),
        }.items():
            done = subprocess.run(["kubectl", *command], capture_output=True, text=True, check=False)
            report.sections.append((title, done.stdout + done.stderr))
    return report
