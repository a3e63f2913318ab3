"""Kubernetes operator: serves SereDeployments and rolls tuned routing policies out, canary first."""
