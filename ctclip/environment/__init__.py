"""Packages, the check of this machine, and the steps of ctclip_setup.py."""
