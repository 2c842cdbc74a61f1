"""Teach a pivot what other models know: fusion functions, losses that never build a dense target, a trainer."""
