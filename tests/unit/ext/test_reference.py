"""The reference keeps the contract that every kernel inherits."""

from __future__ import annotations

from reroute_contract import Call, RerouteContract
from sere_ext.routing.reference import Rerouted, reroute


class TestReference(RerouteContract):
    def run(self, call: Call) -> Rerouted:
        return reroute(**call)
