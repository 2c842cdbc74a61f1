"""An alignment as one HTML page: no script, nothing loaded from elsewhere, everything from data escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.projection import Rows
from fusekit.alignment.quality import AlignmentQuality, Share
from fusekit.alignment.row_cases import Case, plan_rows
from fusekit.alignment.show import pieces, visible
from fusekit.alignment.surfaces import Surfaces

MEANING = {
    "same": "linked; both predict the same bytes next",
    "longer": "linked; the source's next token is longer, the pivot's next token is its first piece",
    "closes": "linked; several source tokens spell the pivot's next token",
    "crosses": "linked; the pivot's next token ends inside a source token",
    "no_row": "linked, but the next tokens cannot be compared",
    "within_same": "inside a source token, whose row is conditioned on the bytes read; then the same bytes",
    "within_longer": "inside a source token, conditioned; the rest is longer",
    "within_closes": "inside a source token, conditioned; several tokens spell the label",
    "within_crosses": "inside a source token, conditioned; the label ends inside another",
    "unlinked": "not linked, and no row",
    "last": "end of the text: nothing to predict",
    "one_hot": "a one-hot on the label",
    "rule": "a row by one of the papers' rules",
}
LOST = ("no_row", "unlinked")

STYLE = """
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
.bar.lost{background:#c9791a}
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


def page(
    quality: AlignmentQuality,
    samples: Sequence[TokenAlignment],
    surfaces: tuple[Surfaces, Surfaces],
    *,
    rows: Sequence[tuple[Rows, Rows] | None] | None = None,
) -> str:
    """The page: figures over the corpus, then each sample with both tokenisations under its text.

    Args:
        quality: the figures.
        samples: alignments to draw.
        surfaces: of the pivot and of the source, for token strings.
        rows: per sample the source's rows [m, k] and the pivot's [n, k'], for the tooltips; None where there are none.
    """
    drawn = "".join(
        _sample(sample, surfaces, rows[i] if rows is not None else None) for i, sample in enumerate(samples)
    )
    title = f"{quality.source} taught to {quality.pivot}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Alignment: pivot {escape(quality.pivot)}, source {escape(quality.source)}</h1>"
        f"{_summary(quality)}<h2>Both tokenisations</h2>{LEGEND}{drawn}"
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
    survived = quality.to_dict()["mass_survived"]
    mass = (
        f" The map carries {100 * survived['mean']:.1f} % of a row's listed mass on average, "
        f"{100 * survived['p10']:.1f} % or less in a tenth of the rows."
        if survived["rows"]
        else ""
    )
    return (
        f"<p>{quality.texts} texts, {quality.pivot_tokens:,} pivot tokens, {quality.source_tokens:,} source tokens. "
        f"<b>{_percent(total.linked, total.positions)}</b> of the pivot's positions are linked; "
        f"<b>{_percent(total.rows, total.positions)}</b> can be taught a row.{mass}</p>"
    )


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


def _sample(alignment: TokenAlignment, surfaces: tuple[Surfaces, Surfaces], rows: tuple[Rows, Rows] | None) -> str:
    data = alignment.text.encode()
    pivot, source = pieces(alignment.pivot, data), pieces(alignment.source, data)
    cases = plan_rows(alignment).cases
    linked_sources = set(alignment.source_at[alignment.source_at >= 0].tolist())
    groups = ""
    for p, s in alignment.groups:
        text = b"".join(pivot[p])
        top = "".join(
            _token(
                visible(pivot[i]),
                len(pivot[i]),
                _tooltip(surfaces[0], int(alignment.pivot_ids[i]), int(alignment.pivot_ends[i]))
                + f"\n{MEANING[Case(int(cases[i])).name.lower()]}"
                + (_top(rows[1], i, surfaces[0], "taught") if rows else ""),
                inner=alignment.source_at[i] < 0,
                lost=Case(int(cases[i])).name.lower() in LOST,
            )
            for i in range(p.start, p.stop)
        )
        bottom = "".join(
            _token(
                visible(source[j]),
                len(source[j]),
                _tooltip(surfaces[1], int(alignment.source_ids[j]), int(alignment.source_ends[j]))
                + (_top(rows[0], j, surfaces[1], "predicts") if rows else ""),
                inner=j not in linked_sources,
                lost=False,
            )
            for j in range(s.start, s.stop)
        )
        groups += (
            f'<div class="group"><div class="read">{escape(_readable(text))}</div>'
            f'<div class="side pivot">{top}</div><div></div><div class="side source">{bottom}</div></div>'
        )
    return f'<div class="text"><div class="flow">{groups}</div></div>'


def _readable(text: bytes) -> str:
    """The text of a group; ``⋯`` where it ends inside a character."""
    shown = text.decode(errors="ignore").replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() or shown.encode() == text else "⋯"


def _token(shown: str, size: int, tooltip: str, *, inner: bool, lost: bool) -> str:
    kind = "tok" + (" inner" if inner else "") + (" lost" if lost else "")
    # Widths follow the bytes, so that ends at different places are seen at different places.
    return f'<span class="{kind}" style="flex-grow:{max(size, 1)}" title="{escape(tooltip)}">{escape(shown)}</span>'


def _tooltip(surfaces: Surfaces, id_: int, end: int) -> str:
    string = surfaces.strings[id_] if id_ < len(surfaces) else "?"
    return f"{string}\nid {id_}, ends at byte {end}"


def _top(rows: Rows, at: int, surfaces: Surfaces, verb: str) -> str:
    listed = [(int(i), float(np.exp(p))) for i, p in zip(rows.ids[at], rows.logprobs[at], strict=True) if i >= 0][:5]
    lines = [f"{100 * p:.1f} % {visible(surfaces.of[i]) if i < len(surfaces) else i}" for i, p in listed]
    return f"\n{verb}:\n" + "\n".join([*lines, f"{100 * float(rows.tail[at]):.1f} % everything else"])
