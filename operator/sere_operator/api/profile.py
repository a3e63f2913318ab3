"""SereProfile: the result of tuning. Its spec is `sere_ext.contract.profile.ProfileSpec`, the same text as `profile.json`."""

from __future__ import annotations

from sere_ext.contract.profile import ProfileSpec
from sere_operator.api.meta import child_name

SereProfileSpec = ProfileSpec


def profile_name(owner: str, spec: ProfileSpec) -> str:
    """Content-addressed name `<owner>-<first 12 hex of the spec's digest>`: other content gets another name."""
    return child_name(owner, spec.digest.removeprefix("sha256:")[:12])
