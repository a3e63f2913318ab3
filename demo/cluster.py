"""`python -m demo.cluster OUT.json [--tune]` on the cluster of demo/site.py: install, serve, switch hot under traffic.

The policy is that of the profile which the demo's first stage certified on this machine, carried into the cluster as a file.
With --tune the operator tunes in the cluster instead, as it does for a model that nobody has tuned.

Writes {"requests", "errors", "pod_restarts", "seconds"}: what a client saw while the policy was rolled out, and how long
it took from the policy's first write to the last pod that runs it, canary and analysis included.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from demo import kube, site
from demo.preflight import RefusedError
from demo.screen import console, waiting
from demo.story import Story
from demo.traffic import Traffic
from sere_ext.contract.policy import EXACT
from sere_ext.contract.profile import Profile, SimilarityRef
from sere_ext.contract.state import EngineState

ROOT = kube.ROOT
BUILD = ROOT / "build" / "demo"
DATA = BUILD / "data"  # what the pods see as the claim `data`
SIMILARITY = BUILD / "similarity.safetensors"
CERTIFIED = BUILD / "run" / "profile.json"  # what the first stage wrote
CARRIED = BUILD / "profile-in-cluster.json"  # the same as it is applied to the cluster
SAMPLES = ROOT / "manifests" / "samples"
ITEMS = 1500  # certify a limit of 2 points
NAME = "demo"
ARTEFACT = f"{NAME}-similarity"  # the ConfigMap that holds the similarity file
SITE = site.current()
NAMESPACE = SITE.namespace


def show(*command: str) -> None:
    """Print a kubectl command and what it says, as a newcomer would type and see it."""
    command = (*command, *(() if "-n" in command else SITE.flags))
    console.print(f"[dim]$ kubectl {escape(shlex.join(command))}[/dim]", soft_wrap=True)
    console.print(kube.kubectl(*command).rstrip(), soft_wrap=True)


def prepare(tunes: bool) -> list[str]:
    """Fill the folder behind the claim `data`. Returns prompts for the client, none of them among the items.

    Args:
        tunes: items and calibration text are needed besides the model.
    """
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    widened = BUILD / "model"
    if not (widened / "model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "tests.assets.make.widen", ROOT / "tests/assets/rows_moe", widened], check=True)
    shutil.copytree(widened, DATA / "model", copy_function=link)
    write_items("client", "calibration", 256, 3)
    if tunes:
        write_items("items", "eval", ITEMS, 2)
        write_items("calib", "calibration", 256, 2)
        if SIMILARITY.exists():  # of the same model, made by the first stage
            shutil.copy(SIMILARITY, DATA)
    return [json.loads(line)["prompt"] for line in (DATA / "client.jsonl").read_text().splitlines()]


def link(source: str, target: str) -> None:
    """Let a file of the model be in the claim without a second copy of its 600 MB on the disk."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)


def write_items(name: str, split: str, count: int, seed: int) -> None:
    """Write `count` items of a split of the model's tasks into the claim."""
    options = ["--model", "rows_moe", "--split", split, "--count", str(count), "--seed", str(seed)]
    command = [sys.executable, "-m", "tests.assets.make.items", *options, "--out", str(DATA / f"{name}.jsonl")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def serve(sample: Path) -> None:
    """Apply the sample and wait until it is Ready: a real token came through its Service."""
    resource = yaml.safe_load(sample.read_text())
    resource["spec"] = SITE.spec(resource["spec"])
    if "tuning" in resource["spec"] and SIMILARITY.exists():
        resource["spec"]["tuning"]["similarity"] = {"uri": f"pvc://data/{SIMILARITY.name}"}
    console.print(f"[dim]$ kubectl apply -f {sample.relative_to(ROOT)}[/dim]")
    kube.apply(resource, namespace=NAMESPACE)
    began = time.monotonic()
    with waiting("vLLM to start in a pod and to answer, about 40 s"):
        kube.wait_for("Ready", lambda: state("Ready").get("status") == "True", 900, every_s=2)
    console.print(f"Ready after {time.monotonic() - began:.0f} s")
    show("get", "sere")


def carried(certified: Path) -> Profile:
    """The certified profile as the cluster gets it: under the demo's name, its similarity file where the operator can read it."""
    profile = Profile.read(certified)
    spec = profile.spec
    if spec.similarity is not None:
        where = SimilarityRef(uri=f"configmap://{ARTEFACT}/{SIMILARITY.name}", digest=spec.similarity.digest)
        spec = spec.model_copy(update={"similarity": where})
    return profile.model_copy(update={"metadata": {"name": NAME}, "spec": spec})


def carry() -> str:
    """Put the certified profile and its similarity file into the cluster; returns the digest of the profile as it is there."""
    profile = carried(CERTIFIED)
    profile.write(CARRIED)
    if profile.spec.similarity is not None:
        show("create", "configmap", ARTEFACT, f"--from-file={SIMILARITY.relative_to(Path.cwd())}")
    show("apply", "-f", str(CARRIED.relative_to(Path.cwd())))
    show("get", "sereprof")
    return profile.spec.digest


def state(kind: str) -> dict[str, Any]:
    return kube.condition(kube.get("sere", NAME, NAMESPACE), kind)


def tune() -> None:
    """Follow the tuning run to its end. No client sends anything meanwhile: it would be measured.

    Raises:
        SystemExit: the run chose no policy; the message is its own.
    """
    shown = ""

    def ended() -> bool:
        nonlocal shown
        jobs = kube.items("seretune", NAMESPACE)
        status = (jobs[0].get("status") or {}) if jobs else {}
        line = f"{status.get('progress') or '0'} trials  {status.get('stage') or 'waiting for its pod'}"
        if line != shown:
            shown = line
            console.print(f"  {time.strftime('%H:%M:%S')}  {line}")
        return bool(status.get("outcome"))

    kube.wait_for("the end of the tuning run", ended, 1200, every_s=3)
    show("get", "seretune")
    (job,) = kube.items("seretune", NAMESPACE)
    if job["status"]["outcome"] != "Chosen":
        message = kube.condition(job, "Complete").get("message", "")
        raise SystemExit(f"the tuning run in the cluster ended as {job['status']['outcome']}: {message}")
    show("get", "sereprof")


def roll_out(prompts: list[str], profile_digest: str | None) -> dict[str, Any]:
    """Watch the policy reach every pod while a client sends requests. Returns the figures.

    Args:
        profile_digest: of the carried profile, which is asked for once requests flow; None: the operator takes its own by itself.
    """
    before = [kube.identity(pod) for pod in kube.pods(NAME, NAMESPACE)]
    config = f"{NAME}-policy"
    with Traffic(SITE.service(NAME), NAME, prompts, concurrency=8, tokens=64) as traffic:
        if profile_digest is not None:
            kube.wait_for("traffic", lambda: traffic.requests >= 16, 60)
            routing = {"mode": "Profile", "profileRef": {"name": NAME, "digest": profile_digest}}
            show("patch", "sere", NAME, "--type=merge", "-p", json.dumps({"spec": {"routing": routing}}))

        def written() -> bool:
            data = (kube.get("configmap", config, NAMESPACE) or {}).get("data") or {}
            return any(key.startswith("sere-") for key in data)

        kube.wait_for("the policy's write", written, 120, every_s=0.2)
        began, story = time.monotonic(), Story()

        def applied() -> bool:
            found = state("PolicyApplied")
            for line in story.news(found, canary_passed):
                console.print(f"  {time.strftime('%H:%M:%S')}  {line}", soft_wrap=True)
            if found.get("reason") == "Rejected":
                raise SystemExit(f"the canary was rejected: {found.get('message')}")
            pods = kube.pods(NAME, NAMESPACE)
            running = {EngineState.parse(kube.get_json(SITE.pod(pod) + "/sere")).policy_digest for pod in pods}
            return bool(pods) and found.get("status") == "True" and EXACT not in running

        kube.wait_for("the policy on every pod", applied, 600, every_s=0.5)
        seconds = time.monotonic() - began
        time.sleep(5)  # and some traffic under the new policy
    after = [kube.identity(pod) for pod in kube.pods(NAME, NAMESPACE)]
    if [uid for uid, _ in after] != [uid for uid, _ in before]:
        raise SystemExit(f"pods were replaced during the rollout: {before} became {after}")
    if traffic.errors:
        console.print(f"[red]failed requests: {traffic.causes}[/red]")
    restarts = sum(count for _, count in after) - sum(count for _, count in before)
    return {"requests": traffic.requests, "errors": traffic.errors, "pod_restarts": restarts, "seconds": round(seconds, 1)}


def canary_passed() -> list[str]:
    """Messages of the Events of canaries that passed, the oldest first."""
    about = f"involvedObject.kind=SereDeployment,involvedObject.name={NAME},reason=CanaryPassed"
    events = kube.items("events", NAMESPACE, fields=about)
    return [event["message"] for event in sorted(events, key=lambda event: str(event["lastTimestamp"]))]


def diagnose() -> None:
    """What a person would look at after a failure, into build/demo/cluster."""
    folder = BUILD / "cluster"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scope = SITE.flags or ("-A",)
    for name, command in {
        "objects": ("get", "sere,seretune,sereprof,deploy,job,pod,cm,svc", *scope, "-o", "wide"),
        "resources": ("get", "sere,seretune,sereprof", *scope, "-o", "yaml"),
        "pods": ("describe", "pods", "-n", NAMESPACE),
        "operator": ("logs", "-n", SITE.system, "deploy/sere-operator", "--tail=-1"),
        "engine": ("logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=engine", "--tail=2000"),
        "tuner": ("logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=tuner", "--tail=2000"),
    }.items():
        done = subprocess.run(["kubectl", *command], capture_output=True, text=True, check=False)
        (folder / f"{name}.txt").write_text(done.stdout + done.stderr)
    if logs := os.environ.get("KUBE_DIR"):
        shutil.copytree(Path(logs) / "log", folder / "log", dirs_exist_ok=True)


def main(out: Path, tunes: bool) -> None:
    prompts = prepare(tunes)
    console.print(f"[dim]$ helm install sere helm/sere-operator --namespace {SITE.system}[/dim]")
    with waiting("the chart's objects and the operator's pod"):
        SITE.install()
    show("-n", SITE.system, "get", "pods")
    SITE.prepare({"data": DATA})
    serve(SAMPLES / ("demo.yaml" if tunes else "demo-profile.yaml"))
    if tunes:
        tune()
    digest = None if tunes else carry()
    figures = roll_out(prompts, digest)
    show("get", "sere")
    show("sere", "explain", NAME)
    out.write_text(json.dumps(figures) + "\n")


def guarded(out: Path, tunes: bool) -> int:
    """`main`, and whatever comes, the cluster left as it was found. Returns the exit status."""
    status = 1
    try:
        main(out, tunes)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except RefusedError as refusal:
        console.print(f"[red]{refusal}[/red]", soft_wrap=True)
    except BaseException as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        diagnose()
        if not isinstance(error, SystemExit | kube.KubectlError | TimeoutError):
            raise
    finally:
        SITE.remove()
    return status


if __name__ == "__main__":
    # A plain kill ends as Ctrl-C does: a cluster of the user's is not left with half a demo.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    parser = argparse.ArgumentParser(prog="python -m demo.cluster", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("out", type=Path, help="file for the figures")
    parser.add_argument("--tune", action="store_true", help="tune in the cluster; else the first stage's profile is rolled out")
    given = parser.parse_args()
    try:
        sys.exit(guarded(given.out, given.tune))
    except kube.KubectlError as error:  # of the taking down
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(1)
