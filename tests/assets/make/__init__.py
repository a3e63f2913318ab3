"""What makes the assets: items, the model and its widened forms, and the records of vLLM. Run as `python -m tests.assets.make.NAME`."""
