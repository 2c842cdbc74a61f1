"""A page that shows who wrote what: self-contained, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fusekit.generation.settings import Generation

COLOURS = ("#1f6feb", "#b35900", "#1a7f37", "#8250df", "#cf222e", "#0a7f8c")
_STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    "pre{white-space:pre-wrap;font:inherit;padding:.6em 1em;border-left:3px solid #8888}"
    "pre.prompt{opacity:.7}span{border-bottom:2px solid}small{opacity:.7}"
)


def page(prompts: Sequence[str], answers: Sequence[Generation], models: Sequence[str], mode: str) -> str:
    """HTML of answers, each segment in the colour of its model, with its scores as a tooltip.

    Args:
        prompts: as they are shown, one for each answer.
        answers: from :func:`fusekit.generation.generate`.
        models: names, in their order.
        mode: named in the heading.
    """
    colour = {model: COLOURS[number % len(COLOURS)] for number, model in enumerate(models)}
    legend = " ".join(f'<span style="color:{colour[model]}">{escape(model)}</span>' for model in models)
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>fusekit generate: {escape(mode)}</title>',
        f"<style>{_STYLE}</style>\n<h1>{escape(mode)}</h1><p>{legend}</p>",
    ]
    for prompt, answer in zip(prompts, answers, strict=True):
        written = "".join(
            f'<span style="color:{colour[s.model]}" title="{escape(f"{s.model}: {_scores(s.scores)}")}">'
            f"{escape(s.text)}</span>"
            for s in answer.segments
        )
        parts.append(f'<pre class="prompt">{escape(prompt)}</pre>\n<pre>{written}</pre><small>{answer.finish}</small>')
    return "\n".join(parts) + "\n</html>\n"


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{model} {score:.3g}" for model, score in scores.items())
