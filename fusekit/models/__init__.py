"""Checkpoints on disk and on the hub before anything is loaded, and the memory there is for them.

Merging and capturing both begin here; nothing in it imports torch, transformers or mergekit.
"""
