"""The reference keeps the contract that every kernel inherits."""

from __future__ import annotations

from sere_ext.routing.reference import Rerouted, reroute
from tests.kit.reroute_contract import Call, RerouteContract


class TestReference(RerouteContract):
    def run(self, call: Call) -> Rerouted:
        return reroute(**call)
