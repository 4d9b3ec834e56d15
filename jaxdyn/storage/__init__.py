"""Disks and buckets: paths of one interface, what we write there whole, and what others wrote.

Imports no JAX.
"""
