"""What a run would do before it does it: stages, tokens, disk, memory and time. Nothing is written.

``models``, ``data``: what is known without loading anything. ``reuse``: what the output holds already. ``measure``: a
short measurement. ``make`` puts them together, by the estimates that the stages refuse by; ``table`` shows the result.
"""
