"""Synthetic chests with the 18 findings, in CT-RATE's layout, and the small CT-CLIP pre-trained on them."""
