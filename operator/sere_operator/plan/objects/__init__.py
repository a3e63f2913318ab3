"""The Kubernetes objects that a SereDeployment owns, and how far the live ones differ from them. Pure."""
