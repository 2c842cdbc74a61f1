"""What runs the forward passes of a capture: transformers in this process, vLLM in this process, or HTTP servers.

Rows, templates, cuts, shards, manifests and resumption are the same for all of them.
"""
