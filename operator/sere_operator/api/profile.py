"""SereProfile: the result of tuning. Its spec is `sere_ext.contract.profile.ProfileSpec`, the same text as `profile.json`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from sere_ext.contract.profile import ProfileSpec
from sere_ext.contract.record import Record

from sere_operator.api.conditions import Conditions
from sere_operator.api.meta import child_name

SereProfileSpec = ProfileSpec


class SereProfileStatus(Record):
    """Columns of `kubectl get sereprofiles`, and whether the content is what its digest says."""

    observed_generation: Annotated[int | None, Field(description="of the spec that was judged")] = None
    conditions: Conditions = ()
    digest: Annotated[str | None, Field(description="sha256 of the canonical spec")] = None
    policy: Annotated[str | None, Field(description="the policy's digest")] = None


def profile_name(owner: str, spec: ProfileSpec) -> str:
    """Content-addressed name `<owner>-<first 12 hex of the spec's digest>`: other content gets another name."""
    return child_name(owner, spec.digest.removeprefix("sha256:")[:12])
