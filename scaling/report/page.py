"""The HTML shell of the report: one file, no network, light and dark, wide and narrow."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

TOOLS = ["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]  # each is a stop of the Tab key, hence few
VERDICT_LINES = 4  # sentences of the verdict that are shown at once
CSS = """
:root{--bg:#fff;--ink:#1c2024;--soft:#5b6570;--line:#d9dee3;--card:#f5f7f9;--good:#00704e;--bad:#b3400a}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e7eaed;--soft:#a3adb7;--line:#343b42;--card:#1d2226;
--good:#4cc79b;--bad:#ff9a62}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px}h2{font-size:1.15rem;margin:36px 0 6px}
p{margin:6px 0}.soft{color:var(--soft);font-size:.92rem}
.verdict{background:var(--card);border-left:5px solid var(--soft);border-radius:4px;padding:14px 18px;margin:18px 0}
.verdict p:first-child{font-size:1.14rem;font-weight:600;margin-top:0}
.scroll{overflow-x:auto;margin:10px 0;max-width:100%}
.choose{display:inline-block;margin:6px 0;font-weight:600}
select{font:inherit;padding:4px 8px;margin-left:6px;color:var(--ink);background:var(--card);
border:1px solid var(--soft);border-radius:4px;max-width:100%}
h3{font-size:1rem;margin:22px 0 4px}
.scroll:focus-visible,button:focus-visible,select:focus-visible,summary:focus-visible,a:focus-visible{
outline:2px solid #0072B2!important;outline-offset:2px}
.tall{max-height:420px;overflow-y:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.wrap{white-space:normal;text-align:left;min-width:220px}
th{color:var(--soft);font-weight:600;position:sticky;top:0;background:var(--bg)}th.wrap{text-align:left}
.pass{color:var(--good);font-weight:600}.fail{color:var(--bad);font-weight:600}.missing{color:var(--bad)}
details{margin:10px 0}summary{cursor:pointer;font-weight:600}
.figure{margin:6px 0 2px;width:100%;min-width:0}
@media (max-width:600px){
.modebar{display:none!important}main{padding:16px 12px 48px}
h1{font-size:1.25rem}.verdict p:first-child{font-size:1.03rem}}
@media print{.tall{max-height:none}}
"""

# Figures carry no colours of their own for text and grid; this gives them the page's, and follows its changes.
SCRIPT = """
function dress(){
  const dark=matchMedia('(prefers-color-scheme: dark)').matches, narrow=innerWidth<600;
  const ink=dark?'#e7eaed':'#1c2024', grid=dark?'#30373e':'#e4e8ec', line=dark?'#59636d':'#9aa4ae';
  document.querySelectorAll('.js-plotly-plot').forEach(d=>{
    const u={'font.color':ink,'font.size':narrow?11:13,'margin.l':narrow?46:64,'margin.r':narrow?8:18,
      'hoverlabel.bgcolor':dark?'#242a30':'#fff','hoverlabel.font.color':ink};
    for(const a of ['xaxis','yaxis']){u[a+'.gridcolor']=grid;u[a+'.linecolor']=line;u[a+'.tickcolor']=line;}
    if(d.layout.xaxis.type==='log')u['xaxis.dtick']=narrow?2:1;
    Plotly.relayout(d,u);
  });
}
function choose(control){
  document.querySelectorAll('[data-group="'+control.dataset.choose+'"] > .panel').forEach(panel=>{
    panel.hidden=panel.dataset.key!==control.value;
    if(!panel.hidden)panel.querySelectorAll('.js-plotly-plot').forEach(d=>Plotly.Plots.resize(d));
  });
}
addEventListener('load',dress);
addEventListener('load',()=>document.querySelectorAll('select[data-choose]').forEach(control=>{
  control.addEventListener('change',()=>choose(control)); choose(control);
}));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change',dress);
matchMedia('(max-width: 600px)').addEventListener('change',dress);
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def document(title: str, body: str) -> str:
    """The whole page; plotly.js is embedded, so it opens offline."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def figure(name: str, plot: go.Figure, caption: str) -> str:
    """One interactive figure with its caption, which is also its text alternative."""
    settings = {"responsive": True, "displaylogo": False, "modeBarButtons": [TOOLS]}
    inner = plotly.io.to_html(plot, include_plotlyjs=False, full_html=False, div_id=f"figure-{name}", config=settings)
    label = escape(caption)
    return f'<div class="figure" role="group" aria-label="{label}">{inner}</div><p class="soft">{label}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], wrap: Sequence[int] = (), tall: bool = False) -> str:
    """A table in its own scrolling box, reachable by keyboard. Cells may hold markup made by `escape` and `mark`."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="wrap">{c}</{tag}>' if i in wrap else f"<{tag}>{c}</{tag}>" for i, c in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(header[0])} table"><table>'
        f"<thead><tr>{cells('th', [escape(h) for h in header])}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def chooser(group: str, label: str, names: Mapping[str, str], panels: Mapping[str, str]) -> str:
    """Panels of which one is shown, and the control that says which; it works by keyboard as any select does."""
    options = "".join(f'<option value="{escape(key)}">{escape(name)}</option>' for key, name in names.items())
    first = next(iter(panels))
    bodies = "".join(
        f'<div class="panel" data-key="{escape(key)}"{"" if key == first else " hidden"}>{body}</div>'
        for key, body in panels.items()
    )
    control = f'<label class="choose">{escape(label)} <select data-choose="{group}">{options}</select></label>'
    return f'{control if len(panels) > 1 else ""}<div data-group="{group}">{bodies}</div>'


def details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def mark(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">fails</span>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def verdict_box(lines: Sequence[str]) -> str:
    """The headline and what carries it; the rest of the sentences one key press away."""
    said = [f"<p>{escape(line)}</p>" for line in lines]
    rest = details("More of the verdict", "".join(said[VERDICT_LINES:])) if said[VERDICT_LINES:] else ""
    return f'<div class="verdict">{"".join(said[:VERDICT_LINES])}{rest}</div>'
