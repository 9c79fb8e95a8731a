"""Differential privacy for whole devices: what a sum may tell about any one of them, and what has been told already.

``docs/privacy.md`` says what is promised; each module here is one part of it.
"""
