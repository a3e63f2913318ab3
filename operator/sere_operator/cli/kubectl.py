"""`kubectl sere`: what runs and why, the kill switch, rollback. Works with the operator down.

Every command reads and writes the API server alone. What a command changes is what the pods themselves read (their
annotations, the policy ConfigMap), so it takes effect without the operator; the annotation on the resource keeps the
operator from undoing it.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from sere_ext.contract.errors import ApiError, SereError, UsageError
from sere_ext.contract.policy import EXACT
from sere_ext.contract.state import EngineState
from sere_ext.contract.volume import OVERRIDE, STABLE, policy_file
from sere_operator.api import meta
from sere_operator.cli.cluster import Cluster
from sere_operator.cli.explain import Object, explain, override_of, pod_ready, stable_of

app = typer.Typer(
    name="kubectl-sere",
    help="Served models and their routing policies: what runs and why, the kill switch, rollback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Name = Annotated[str, typer.Argument(help="Name of the SereDeployment.", show_default=False)]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Default: that of the kubeconfig's context.")]
Context = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig. Default: the current one.")]


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Default: all of the namespace.", show_default=False)] = None,
    namespace: Namespace = None,
    context: Context = None,
    live: Annotated[bool, typer.Option("--live", help="Ask every pod what it runs (needs the right to pods/proxy).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """What is served, with which policy, on which pods."""
    cluster = Cluster.connect(namespace, context)
    deployments = [cluster.deployment(name)] if name else cluster.deployments()
    reports = [_report(cluster, deployment, live) for deployment in deployments]
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
        return
    if not reports:
        typer.echo(f"no SereDeployment in namespace {cluster.namespace}")
    for report in reports:
        _print(report)


def _report(cluster: Cluster, deployment: Object, live: bool) -> Object:
    name, current = deployment["metadata"]["name"], deployment.get("status") or {}
    config_map = cluster.policies(name)
    stable = stable_of(deployment, config_map)
    pods = []
    for pod in cluster.pods(name):
        annotations = pod["metadata"].get("annotations") or {}
        statuses = (pod.get("status") or {}).get("containerStatuses") or []
        runs = None
        if live:
            try:
                state = cluster.pod_state(pod["metadata"]["name"])
                runs = "exact (override)" if state.override else state.policy_digest
            except ApiError as error:
                runs = f"? ({error})"
        pods.append(
            {
                "name": pod["metadata"]["name"],
                "ready": pod_ready(pod),
                "restarts": sum(one.get("restartCount", 0) for one in statuses),
                "wanted": annotations.get(meta.POLICY_ANNOTATION) or stable,
                "override": annotations.get(meta.OVERRIDE_ANNOTATION) == meta.OVERRIDE_EXACT,
                **({"runs": runs} if live else {}),
            }
        )
    return {
        "name": name,
        "ready": current.get("ready"),
        "routing": (deployment["spec"].get("routing") or {}).get("mode", "Exact"),
        "policy": stable,
        "override": override_of(deployment, config_map),
        "conditions": current.get("conditions") or [],
        "pods": pods,
    }


def _print(report: Object) -> None:
    console = Console(highlight=False, soft_wrap=True)
    switch = "   KILL SWITCH ON: every pod routes exactly" if report["override"] else ""
    ready, routing = report["ready"] or "?", report["routing"]
    console.print(f"{report['name']}   ready {ready}   routing {routing}   policy {report['policy']}{switch}", markup=False)
    for condition in report["conditions"]:
        words = f"  {condition['type']:<14} {condition['status']:<8} {condition['reason']:<16} {condition.get('message', '')}"
        console.print(words.rstrip(), markup=False)
    if report["pods"]:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        live = "runs" in report["pods"][0]
        for head in ("  POD", "READY", "RESTARTS", "WANTED", *(["RUNS"] if live else [])):
            table.add_column(head, overflow="fold")
        for pod in report["pods"]:
            wanted = "exact (override)" if pod["override"] else pod["wanted"]
            cells = [f"  {pod['name']}", "yes" if pod["ready"] else "no", str(pod["restarts"]), wanted]
            table.add_row(*cells, *([str(pod["runs"])] if live else []))
        console.print(table)


@app.command("explain")
def explain_command(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Why the running policy runs, and why a better one does not yet."""
    cluster = Cluster.connect(namespace, context)
    deployment = cluster.deployment(name)
    job_name = (deployment.get("status") or {}).get("tuningJob")
    job = cluster.get(meta.TUNING_JOB_KIND, job_name) if job_name else None
    for sentence in explain(deployment, cluster.pods(name), cluster.policies(name), job):
        typer.echo(sentence)


@app.command()
def exact(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    off: Annotated[bool, typer.Option("--off", help="Lift the kill switch: back to the policy.")] = False,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the pods to confirm; 0: do not ask.")] = 15.0,
) -> None:
    """Kill switch: exact routing on every pod within seconds, no restart. Works with the operator down."""
    cluster = Cluster.connect(namespace, context)
    cluster.deployment(name)
    value = None if off else meta.OVERRIDE_EXACT
    problems: list[str] = []
    # The resource first, so that an operator at work does not undo the rest; the ConfigMap before the pods, so that a pod
    # made in between comes up with it. A step that fails does not keep the others from being taken.
    _try(problems, lambda: cluster.annotate(meta.DEPLOYMENT_KIND, name, override=value))
    config_map = meta.policy_config_map(name)
    if cluster.policies(name) is None:
        # Nothing has been deployed: the annotation is all there is to set, and the operator makes the rest follow it.
        typer.echo(f"there is no ConfigMap {config_map} yet; the operator will make it with the switch as it is now")
    else:
        _try(problems, lambda: cluster.merge("ConfigMap", config_map, {"data": {OVERRIDE: value}}))
    asked = []
    for pod in (pod["metadata"]["name"] for pod in cluster.pods(name)):
        # The nonce makes the kubelet refresh the volume at once.
        step = partial(cluster.annotate, "Pod", pod, override=value, refresh=secrets.token_hex(4))
        if _try(problems, step):
            asked.append(pod)
    what = "lifted" if off else "on"
    typer.echo(f"kill switch {what} for {name}: {len(asked)} pod(s) ordered")
    if wait and asked:
        _confirm(cluster, asked, not off, wait)
    if problems:
        _fail(problems)


def _try(problems: list[str], step: Callable[[], None]) -> bool:
    try:
        step()
    except ApiError as error:
        problems.append(str(error))
        return False
    return True


def _follows(state: EngineState, override: bool) -> bool:
    """Whether the pod's answer shows the switch's position: exact on every rank, since truth lives in the workers."""
    if not override:
        return not state.override
    return {state.policy_digest, *(rank.policy_digest for rank in state.ranks)} == {EXACT}


def _confirm(cluster: Cluster, pods: list[str], override: bool, seconds: float) -> None:
    """Ask the pods until all of them confirm. Pods that cannot be asked are named as not confirmed."""
    until, open_pods, last = time.monotonic() + seconds, set(pods), ""
    while open_pods and time.monotonic() < until:
        for pod in sorted(open_pods):
            try:
                if _follows(cluster.pod_state(pod), override):
                    open_pods.discard(pod)
            except ApiError as error:
                last = str(error)
        if open_pods:
            time.sleep(0.3)
    if not open_pods:
        typer.echo(f"confirmed by {len(pods)} pod(s): {'exact routing' if override else 'routing by policy'}")
    else:
        why = f"; {last}" if last else ""
        typer.echo(f"not confirmed by {len(open_pods)} of {len(pods)} pod(s) within {seconds:g} s{why}", err=True)


@app.command()
def rollback(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    off: Annotated[bool, typer.Option("--off", help="Allow the policy that was given up again.")] = False,
) -> None:
    """Give up the newest policy: the one on its way, else the one in force, for the one before it."""
    cluster = Cluster.connect(namespace, context)
    deployment = cluster.deployment(name)
    if off:
        cluster.annotate(meta.DEPLOYMENT_KIND, name, rollback=None)
        typer.echo(f"{name}: nothing is given up any more; the operator goes for what the spec wants")
        return
    current, config_map = deployment.get("status") or {}, cluster.policies(name)
    stable = stable_of(deployment, config_map)
    candidate = (current.get("rollout") or {}).get("candidate")
    given_up = candidate or stable
    if given_up == EXACT:
        raise UsageError(f"{name} routes exactly and no other policy is on its way: there is nothing to give up")
    cluster.annotate(meta.DEPLOYMENT_KIND, name, rollback=given_up)
    target = stable if candidate and candidate != stable else _before(current, config_map, given_up)
    # What the operator would do, done here too, so that it happens with the operator down.
    if config_map is not None and target != stable:
        cluster.merge("ConfigMap", meta.policy_config_map(name), {"data": {STABLE: target}})
    for pod in cluster.pods(name):
        cluster.annotate("Pod", pod["metadata"]["name"], policy=None, refresh=secrets.token_hex(4))
    typer.echo(
        f"{name}: policy {given_up} is given up, {target} is in force; `kubectl sere rollback {name} --off` allows it again"
    )


def _before(current: Object, config_map: Object | None, given_up: str) -> str:
    """The policy before, if the pods still have it; else exact, which needs no file."""
    previous = (current.get("policy") or {}).get("previous")
    known = (config_map or {}).get("data") or {}
    return previous if previous and previous != given_up and policy_file(previous) in known else EXACT


@app.command()
def approve(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Promote the policy whose canary passed, where rollout.approval is Manual."""
    cluster = Cluster.connect(namespace, context)
    candidate = ((cluster.deployment(name).get("status") or {}).get("rollout") or {}).get("candidate")
    if not candidate:
        raise UsageError(f"{name}: no policy is on its way; `kubectl sere explain {name}` says why")
    cluster.annotate(meta.DEPLOYMENT_KIND, name, approved=candidate)
    typer.echo(f"{name}: policy {candidate} is approved")


def _fail(problems: list[str]) -> NoReturn:
    for problem in problems:
        typer.echo(f"kubectl sere: {problem}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script `kubectl-sere`, which kubectl finds as `kubectl sere`."""
    try:
        app()
    except SereError as error:
        silent = isinstance(error, ApiError) and not error.status
        advice = "; check that the cluster runs, and KUBECONFIG and --context" if silent else ""
        typer.echo(f"kubectl sere: {error}{advice}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
