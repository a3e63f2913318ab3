"""Names that more than one part must spell alike: the Kubernetes API group and the engine's port."""

from __future__ import annotations

from typing import Final

GROUP: Final = "serving.sere.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "serving.sere.dev/v1alpha1"  # GROUP/VERSION, whole so that it can be a Literal
SIMILARITY_LABEL: Final = f"{GROUP}/similarity"  # of a ConfigMap that carries a similarity file: the file's name
ENGINE_PORT: Final = 8000  # vLLM's own default
OPENINGS_NAME: Final = "sere-openings"  # ConfigMap of a namespace: which held-out items tuning runs opened, a key for each model
TUNER_FIELD_MANAGER: Final = "sere-tuner"  # of the ConfigMaps that a tuning run publishes
