"""An alignment as one HTML page: no script, nothing loaded from elsewhere, everything from data escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.cases import Case
from fusekit.alignment.quality import AlignmentQuality, Share
from fusekit.alignment.samples import LOST, MEANING, Sample, Token, sample_of
from fusekit.alignment.surfaces import Surfaces
from fusekit.alignment.worth import TeacherWorth
from fusekit.types import TopK

SAMPLE_STYLE = """
.text{border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:.6em 0}
.flow{display:flex;flex-wrap:wrap;row-gap:14px;margin-top:8px}
.group{display:grid;grid-template-rows:auto auto 12px auto;border-right:3px solid var(--link);position:relative;
min-width:1.1em;max-width:100%}
.group::after{content:"";position:absolute;right:-6px;bottom:calc(50% - 1.2em);width:9px;height:9px;border-radius:50%;
background:var(--link)}
.read{padding:0 5px;white-space:pre-wrap;overflow-wrap:anywhere;text-align:center;color:var(--dim)}
.side{display:flex}.tok{flex:1 1 auto;font:13px/1.7 ui-monospace,monospace;padding:0 5px;text-align:center;
border-right:1px solid var(--paper);white-space:pre-wrap;overflow-wrap:anywhere;cursor:help}
.pivot .tok{background:var(--pivot)}.source .tok{background:var(--source)}
.tok.inner{border-right:2px dashed #c9791a}.tok.lost{background:var(--miss)}
.key{display:inline-block;padding:0 8px;border-radius:3px;font:13px/1.7 ui-monospace,monospace;margin-right:4px}
"""
"""Of :func:`drawn` and :data:`LEGEND`; the page gives the colours line, link, dim, paper, pivot, source and miss."""

STYLE = (
    """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#5b6470;--paper:#fff;--line:#d5dae1;--pivot:#dbe9ff;--source:#dff3e3;
--miss:#ffe2b8;--link:#2563c9}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#a2abb7;--paper:#16191d;--line:#3a414b;--pivot:#1f3a63;
--source:#1d4429;--miss:#6b4612;--link:#79aaff}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;
padding:16px}
h1{font-size:1.35rem;margin:.2em 0}h2{font-size:1.08rem;margin:1.6em 0 .4em}p{margin:.4em 0;max-width:75ch}
.dim{color:var(--dim)}.table{overflow-x:auto}
table{border-collapse:collapse;margin:.4em 0}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{display:inline-block;height:.7em;background:var(--link);border-radius:2px;min-width:1px}
.bar.lost{background:#c9791a}"""
    + SAMPLE_STYLE
)


def page(
    quality: AlignmentQuality,
    samples: Sequence[TokenAlignment],
    surfaces: tuple[Surfaces, Surfaces],
    *,
    rows: Sequence[tuple[TopK, TopK] | None] | None = None,
) -> str:
    """The page: figures over the corpus, then each sample with both tokenisations under its text.

    Args:
        quality: the figures.
        samples: alignments to draw.
        surfaces: of the pivot and of the source, for token strings.
        rows: per sample the source's rows [m, k] and the pivot's [n, k'], for the tooltips; None where there are none.
    """
    texts = "".join(
        drawn(sample_of(sample, surfaces, rows[i] if rows is not None else None)) for i, sample in enumerate(samples)
    )
    title = f"{quality.source} taught to {quality.pivot}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Alignment: pivot {escape(quality.pivot)}, source {escape(quality.source)}</h1>"
        f"{_summary(quality)}{_worth(quality.worth)}<h2>Both tokenisations</h2>{LEGEND}{texts}"
        f"{_cases(quality)}{_shares('By script', quality.scripts)}"
        f"{_shares('By source of data', quality.data) if len(quality.data) > 1 else ''}{_groups(quality)}"
        f"{_worst(quality)}</body></html>\n"
    )


LEGEND = (
    '<p><span class="key" style="background:var(--pivot)">pivot tokens</span>'
    '<span class="key" style="background:var(--source)">source tokens</span>'
    '<span class="key" style="border-right:3px solid var(--link)">link</span> both models have read the same text '
    '<span class="key" style="border-right:2px dashed #c9791a">no link</span> a token ends where the other side has no '
    'end <span class="key" style="background:var(--miss)">nothing is taught</span></p>'
    '<p class="dim">␣ space, ⏎ line break, ⇥ tab, '
    "\\xNN a byte inside a character (⋯ in the text), ∅ a token without text."
    " Point at a token for its id, where it ends and what the source teaches there.</p>"
)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _summary(quality: AlignmentQuality) -> str:
    total = quality.total
    return (
        f"<p>{quality.texts} texts, {quality.pivot_tokens:,} pivot tokens, {quality.source_tokens:,} source tokens. "
        f"<b>{_percent(total.linked, total.positions)}</b> of the pivot's positions are linked; "
        f"<b>{_percent(total.rows, total.positions)}</b> can be taught a row.</p>"
    )


def _worth(worth: TeacherWorth | None) -> str:
    if worth is None:
        return ""
    said = "<br>".join(map(escape, worth.summary))
    body = ""
    for case in Case:
        if count := int(worth.labels[case]):
            teacher, pivot = (f"{nats:.3f}" if nats is not None else "-" for nats in worth.per_label(case))
            note = "worse than the pivot" if worth.is_worse(case) else ""
            body += (
                f'<tr><td>{MEANING[case.name.lower()]}</td><td class="n">{count:,}</td><td class="n">{teacher}</td>'
                f'<td class="n">{pivot}</td><td>{note}</td></tr>'
            )
    head = '<tr><th>label</th><th class="n">count</th><th class="n">teacher</th><th class="n">pivot</th><th></th></tr>'
    title = "<h2>What the teacher is worth, in nats per label</h2>"
    return f'{title}<p>{said}</p><div class="table"><table>{head}{body}</table></div>'


def _cases(quality: AlignmentQuality) -> str:
    body = ""
    for case in Case:
        name = case.name.lower()
        if count := quality.cases[name]:
            share = count / max(quality.pivot_tokens, 1)
            kind = "bar lost" if name in LOST else "bar"
            body += (
                f'<tr><td>{MEANING[name]}</td><td class="n">{count:,}</td><td class="n">{100 * share:.1f} %</td>'
                f'<td><span class="{kind}" style="width:{120 * share:.0f}px"></span></td></tr>'
            )
    head = '<tr><th>pivot position</th><th class="n">count</th><th class="n">share</th><th></th></tr>'
    return f'<h2>What is taught, what is lost and why</h2><div class="table"><table>{head}{body}</table></div>'


def _shares(title: str, shares: dict[str, Share]) -> str:
    head = '<tr><th></th><th class="n">positions</th><th class="n">linked</th><th class="n">with a row</th></tr>'
    body = "".join(
        f'<tr><td>{escape(name) or "-"}</td><td class="n">{share.positions:,}</td>'
        f'<td class="n">{_percent(share.linked, share.positions)}</td>'
        f'<td class="n">{_percent(share.rows, share.positions)}</td></tr>'
        for name, share in sorted(shares.items(), key=lambda item: -item[1].positions)
    )
    return f'<h2>{escape(title)}</h2><div class="table"><table>{head}{body}</table></div>'


def _groups(quality: AlignmentQuality) -> str:
    total = sum(quality.shapes.values())
    body = "".join(
        f'<tr><td>{shape}</td><td class="n">{count:,}</td><td class="n">{_percent(count, total)}</td></tr>'
        for shape, count in quality.shapes.most_common()
    )
    head = '<tr><th>pivot-source tokens</th><th class="n">groups</th><th class="n">share</th></tr>'
    return f'<h2>Groups between links</h2><div class="table"><table>{head}{body}</table></div>'


def _worst(quality: AlignmentQuality) -> str:
    losing = [(share, text) for share, text in quality.worst if share < 1]
    if not losing:
        return ""
    body = "".join(
        f'<tr><td class="n">{100 * share:.1f} %</td><td>{escape(text[:200])}{"…" if len(text) > 200 else ""}</td></tr>'
        for share, text in losing
    )
    head = '<tr><th class="n">with a row</th><th>text</th></tr>'
    return f'<h2>Texts that lose most</h2><div class="table"><table>{head}{body}</table></div>'


def drawn(sample: Sample) -> str:
    """A text under both tokenisations, as HTML that :data:`SAMPLE_STYLE` styles; everything of it is escaped."""
    groups = "".join(
        f'<div class="group"><div class="read">{_text(group.read)}</div>'
        f'<div class="side pivot">{"".join(map(_token, group.pivot))}</div><div></div>'
        f'<div class="side source">{"".join(map(_token, group.source))}</div></div>'
        for group in sample.groups
    )
    return f'<div class="text"><div class="flow">{groups}</div></div>'


def _token(token: Token) -> str:
    kind = "tok" + (" inner" if token.inner else "") + (" lost" if token.lost else "")
    # Widths follow the bytes, so that ends at different places are seen at different places.
    grow = max(token.size, 1)
    return f'<span class="{kind}" style="flex-grow:{grow}" title="{_text(token.about)}">{_text(token.shown)}</span>'


# They turn round what follows them, on this page too.
_TURNS = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), "⋯")


def _text(text: str) -> str:
    return escape(text.translate(_TURNS))
