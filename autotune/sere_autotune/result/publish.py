"""`--publish configmap/<namespace>/<name>`: the result as a ConfigMap, by server-side apply from inside the pod.

The whole object is applied each time under one field manager, so a later apply without a key removes it. The similarity
artefact lies in ConfigMaps beside it (`sere_ext.contract.shards`), written before the profile names the first of them.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from sere_autotune.result.results import Finished
from sere_ext.contract.config_maps import config_maps, encoded, uri
from sere_ext.contract.errors import PublishError, UsageError
from sere_ext.contract.names import OPENINGS_NAME, TUNER_FIELD_MANAGER
from sere_ext.contract.volume import MAX_FILE_BYTES

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PROGRESS_EVERY_S = 5.0
_FINAL_PATIENCE_S = 300.0
FINAL = (400, 403, 404, 413, 422)  # HTTP statuses of what is refused for good


@dataclass(frozen=True)
class Target:
    """Where to publish."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Target:
        parts = text.split("/")
        if len(parts) != 3 or parts[0] != "configmap" or not all(parts):
            raise UsageError(f"--publish {text}: give configmap/<namespace>/<name>")
        return cls(parts[1], parts[2])


@dataclass(frozen=True)
class Access:
    """How to reach the API server."""

    url: str
    token: Callable[[], str]  # read anew each time: projected tokens are rotated
    ca: str | bool = True

    @classmethod
    def from_pod(cls) -> Access:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        token = _ACCOUNT / "token"
        if not host or not token.is_file():
            raise UsageError("--publish works inside a pod with a service account; leave it out here, the files are in `out`")
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", lambda: token.read_text().strip(), str(_ACCOUNT / "ca.crt"))


def _spent_and_tried(summary: dict[str, Any]) -> dict[str, Any]:
    """What the SereTuningJob's status shows beside the outcome."""
    found: dict[str, Any] = {}
    if "spent" in summary:
        found["deviceHours"] = f"{summary['spent']['deviceHours']:.2f}"
    if "ladder" in summary:
        found["candidates"] = [{"policy": row["describe"], "verdict": row["verdict"]} for row in summary["ladder"]]
    return found


class _RefusedError(PublishError):
    """The API server does not take a ConfigMap. `status` is the HTTP status."""

    def __init__(self, status: int, what: str, words: str) -> None:
        self.status = status
        kind = "refused for good" if status in FINAL else "refused for now"
        super().__init__(f"the API server {kind} {what} ({status}): {words}")


class Publisher:
    """Applies the ConfigMaps. Progress is best effort and within a stage seldom, the end is tried for five minutes."""

    def __init__(self, target: Target, access: Access) -> None:
        self.target, self.access = target, access
        self._last = 0.0
        self._stage: Any = None
        self._told: dict[str, str] = {}  # data of the last progress

    def check(self) -> None:
        """Publish that the run begins, before it costs anything: without the right to publish it would all be for nothing.

        Raises:
            PublishError: the API server refuses it, or cannot be reached.
        """
        self._told = {"progress.json": json.dumps({"stage": "starting", "now": "the tuner reads its input"})}
        self._persist(self._result(self._told))

    def progress(self, snapshot: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_EVERY_S and snapshot.get("stage") == self._stage:
            return  # but never a new stage: it may be the last that is told for minutes
        self._last, self._stage = now, snapshot.get("stage")
        self._told = {"progress.json": json.dumps(snapshot)}
        try:
            self._apply(self._result(self._told))
        except (httpx2.HTTPError, PublishError):
            pass  # the next one, or the end, will do

    def finish(self, finished: Finished) -> None:
        """The outcome, and what the operator needs where a policy was chosen."""
        data = {"outcome.json": json.dumps(finished.outcome.published() | _spent_and_tried(finished.summary))}
        if finished.profile is not None:
            profile = finished.profile
            if finished.similarity is not None:
                profile = _with_uri(profile, self._publish_artefact(finished.similarity.read_bytes()))
            data["profile.json"] = json.dumps(profile)
        self._persist(self._result(data))

    def _publish_artefact(self, content: bytes) -> str:
        """Write the artefact's shards; the URI by which the profile refers to them.

        They have the result's owners, so they go with the run. What an earlier attempt left of a longer file is referred to
        by nothing and goes with the run as well.
        """
        if len(content) > MAX_FILE_BYTES:
            raise PublishError(
                f"the similarity artefact has {len(content):,} bytes, of which {MAX_FILE_BYTES:,} can be given to pods; "
                "tune with one that `sere similarity pack` made, named in `similarity`"
            )
        owners = [
            {key: owner[key] for key in ("apiVersion", "kind", "name", "uid", "controller") if key in owner}
            for owner in self._persist(self._result(self._told))["metadata"].get("ownerReferences", [])
        ]
        bodies = config_maps(encoded(content), self.target.name)
        for body in bodies:
            if owners:
                body["metadata"]["ownerReferences"] = owners
            self._persist(body)
        return uri(bodies)

    def read_openings(self, model: str) -> tuple[dict[str, Any], str]:
        """What earlier tuning runs of this namespace noted of a model's held-out items (`study.ledger`), and the object's version.

        Applied without data by a field manager that owns none, the ConfigMap is made if it is missing and comes back as it is.
        """
        found = self._persist(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": OPENINGS_NAME}}, "sere-openings-reader"
        )
        packed = (found.get("data") or {}).get(model)
        try:
            content = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else {}
        except (OSError, EOFError, ValueError) as error:
            raise PublishError(f"key {model} of ConfigMap {OPENINGS_NAME} cannot be read ({error}); delete the key") from error
        return content if isinstance(content, dict) else {}, str(found["metadata"]["resourceVersion"])

    def write_openings(self, model: str, content: dict[str, Any], version: str) -> bool:
        """Note them for the runs that follow, unless the object has changed since `version`: then False.

        Each model's key has a field manager of its own, so no run removes another's.
        """
        packed = base64.b64encode(gzip.compress(json.dumps(content).encode(), mtime=0)).decode()
        metadata = {"name": OPENINGS_NAME, "resourceVersion": version}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {model: packed}}
        try:
            self._persist(body, f"sere-openings-{model}", final=(*FINAL, 409))
        except _RefusedError as error:
            if error.status == 409:
                return False
            if error.status in (413, 422):
                raise PublishError(
                    f"ConfigMap {OPENINGS_NAME}, which notes the held-out items that tuning runs of this namespace opened, has no "
                    f"room for {len(content['opened']):,} of model {model}: {error}; delete the key of a model that is tuned no "
                    "more, or tune in another namespace"
                ) from error
            raise
        return True

    def failed(self, message: str, exit_code: int, outcome: str = "Failed") -> None:
        body = {"outcome": outcome, "message": message, "exitCode": exit_code, "trials": {}}
        self._persist(self._result({"outcome.json": json.dumps(body)}))

    def _result(self, data: dict[str, str]) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": self.target.name}, "data": data}

    def _persist(
        self, body: dict[str, Any], manager: str = TUNER_FIELD_MANAGER, final: Collection[int] = FINAL
    ) -> dict[str, Any]:
        """Apply, with patience; the object as it is then.

        Args:
            final: HTTP statuses after which it is not tried again.
        """
        deadline = time.monotonic() + _FINAL_PATIENCE_S
        pause = 1.0
        while True:
            try:
                return self._apply(body, manager)
            except httpx2.HTTPError as error:
                if time.monotonic() > deadline:
                    raise PublishError(f"the API server at {self.access.url} cannot be reached: {error}") from error
            except _RefusedError as error:
                if error.status in final or time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 30)

    def _apply(self, body: dict[str, Any], manager: str = TUNER_FIELD_MANAGER) -> dict[str, Any]:
        name, namespace = body["metadata"]["name"], self.target.namespace
        # Without the proxies of the environment: those are for weights from outside, and know no address of the cluster.
        with httpx2.Client(trust_env=False, verify=self.access.ca, timeout=20) as client:
            answer = client.patch(
                f"{self.access.url}/api/v1/namespaces/{namespace}/configmaps/{name}",
                params={"fieldManager": manager, "force": "true"},
                content=json.dumps(body).encode(),
                headers={"Content-Type": "application/apply-patch+yaml", "Authorization": f"Bearer {self.access.token()}"},
            )
        if answer.status_code >= 300:
            raise _RefusedError(answer.status_code, f"configmap {namespace}/{name}", _message(answer))
        applied: dict[str, Any] = answer.json()
        return applied


def _with_uri(profile: dict[str, Any], where: str) -> dict[str, Any]:
    """The profile with its artefact where the cluster can read it."""
    spec = profile["spec"]
    return {**profile, "spec": {**spec, "similarity": {**spec["similarity"], "uri": where}}}


def _message(answer: Any) -> str:
    try:
        return str(answer.json().get("message", answer.text))[:300]
    except ValueError:
        return str(answer.text)[:300]
