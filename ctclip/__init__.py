"""CT-CLIP for VLM3D Task 2: everything behind the scripts, in the order of the job. docs/architecture.md draws it."""

__version__ = "0.7.0"
