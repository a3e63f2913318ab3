"""Inside vLLM's workers: the entry point, the settings, and the seam through which a model's routers ask the kernel."""
