"""RLEKF inside other people's trainers."""
