"""A model over scans: predictions, heat maps, zero-shot prompts, ONNX."""
