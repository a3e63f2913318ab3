"""The base class of every JSON object that crosses a border between parts, and the bytes that digests are taken of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


def outside_name(name: str) -> str:
    """`tpot_ms` -> `tpotMs`. Pydantic's own generator turns `e2el_ms` into `e2ElMs`."""
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


class Record(BaseModel):
    """Base of every JSON object that crosses a border: names are camelCase in JSON and snake_case in Python; unknown keys are refused."""

    model_config = ConfigDict(alias_generator=outside_name, populate_by_name=True, extra="forbid", frozen=True)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON values under their outside names, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_json(self) -> str:
        """JSON text of `to_json_dict`."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Unset:
    """What holds where an optional field is left out, in words for the help of a flag or a resource's field."""

    text: str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The field's JSON schema with the words beside it as `x-unset`."""
        return {**handler(core_schema), "x-unset": self.text}


def canonical_json(data: Any) -> bytes:
    """The bytes that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def content_digest(content: bytes) -> str:
    """`sha256:` and 64 hex digits."""
    return "sha256:" + hashlib.sha256(content).hexdigest()
