"""RLEKF inside other trainers."""
