"""The landing between the halves: what both need and neither may take from the other.

Imports nothing of the package but `ops/`.
"""
