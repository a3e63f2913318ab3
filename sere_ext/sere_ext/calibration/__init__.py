"""`sere calibrate`: runs texts through a model and measures how alike the experts of each layer answer."""
