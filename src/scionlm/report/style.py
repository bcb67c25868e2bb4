"""The style sheet of every page: one text column, colors by role, light, dark, phone and print.

Colors carry meaning: green is the child (of one that continues: the new text), orange the control, slate the source,
blue what a continued model knew before, on the page as in the drawings. Each
differs from the others in lightness or shape too, and every text color has a contrast of 4.5 or more on its ground.
Where many runs are compared they have colors of their own, k0 to k7, and then the same ones with dashed lines.
"""

_LIGHT = """
  --paper: #faf9f5; --card: #ffffff; --ink: #1b211d; --soft: #59625c; --rule: #e2e0d8; --grid: #eceae3;
  --child: #0a6b57; --control: #ad4708; --source: #49546f; --plain: #59625c;
  --track: #e4ebe6; --cell: #e9e7df; --on-fill: #ffffff;
  --done: #0a6b57; --going: #2456a6; --bad: #b3261e; --warn: #8a5a00;
  --upstream: #2456a6;
  --k0: #0a6b57; --k1: #2456a6; --k2: #b0178a; --k3: #7d5a00; --k4: #6b3fa0; --k5: #0e6d84; --k6: #5a6600;
  --k7: #b3261e;
"""

_DARK = """
  --paper: #131715; --card: #1a201d; --ink: #e9ece9; --soft: #a3ada6; --rule: #303833; --grid: #262d29;
  --child: #4fd1ae; --control: #ff9f66; --source: #aab6d3; --plain: #a3ada6;
  --track: #2a332e; --cell: #2b322e; --on-fill: #0c1a15;
  --done: #4fd1ae; --going: #8ab4f8; --bad: #ff8a80; --warn: #f0c060;
  --upstream: #8ab4f8;
  --k0: #4fd1ae; --k1: #8ab4f8; --k2: #f48fd0; --k3: #e0b050; --k4: #c0a0ff; --k5: #5fd0e8; --k6: #b8cc50;
  --k7: #ff8a80;
"""

_TEXT = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums lining-nums; overflow-wrap: anywhere; }
h1, h2, h3, p, dl, dd, figure, pre { margin: 0; }
h1 { font-size: 1.15rem; font-weight: 650; line-height: 1.35; }
h2 { font-size: 1.3rem; font-weight: 650; line-height: 1.3; letter-spacing: -0.01em; margin-bottom: .35rem; }
h3 { font-size: 1rem; font-weight: 650; }
.columns + h3 { margin-top: 1.6rem; }
h3.sub { font-size: 1.1rem; margin-top: 2.25rem; }
section { margin-top: 3.25rem; }
section > p, .note { max-width: 46rem; text-wrap: pretty; }
section > p + p { margin-top: .6rem; }
.note { color: var(--soft); font-size: .9rem; line-height: 1.55; margin-top: .75rem; }
.soft { color: var(--soft); }
:is(strong, b).child { color: var(--child); }
:is(strong, b).control { color: var(--control); }
:is(strong, b).source { color: var(--source); }
:is(strong, b).upstream { color: var(--upstream); }
:focus-visible { outline: 2px solid var(--going); outline-offset: 3px; border-radius: 3px; }
.eyebrow { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .7rem; margin-bottom: .9rem;
  color: var(--soft); font-size: .9rem; }
.eyebrow svg { width: 1.5rem; height: 1.5rem; flex: none; }
.state { border: 1.5px solid; border-radius: 99px; padding: 0 .65em; font-size: .82rem; font-weight: 650; }
.state.done { color: var(--done); } .state.running { color: var(--going); }
.state.stopped, .state.unknown { color: var(--warn); } .state.failed { color: var(--bad); }
.lead { font-size: clamp(1.3rem, 1.05rem + 1.3vw, 1.8rem); line-height: 1.38; letter-spacing: -0.012em;
  margin-top: .8rem; text-wrap: pretty; }
.lead strong { font-weight: 680; } .short { white-space: nowrap; }
.verdict { font-size: 1.08rem; margin-top: 1rem; max-width: 50rem; text-wrap: pretty; }
.banner { border-left: 4px solid var(--warn); background: var(--card); padding: .8rem 1.1rem; margin-top: 1.6rem;
  border-radius: 0 8px 8px 0; }
.banner.failed { border-color: var(--bad); } .banner.running { border-color: var(--going); }
.banner p + p { margin-top: .3rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .85rem; }
"""

_PARTS = """
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 1.25rem;
  margin-top: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin-top: 1.25rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
.tiles > div { box-shadow: 1px 0 0 var(--rule), 0 1px 0 var(--rule);
  padding: .85rem 1.1rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.tiles dd { font-size: 1.45rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.015em; }
.tiles dt { font-size: .84rem; color: var(--soft); line-height: 1.4; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.6rem 2.2rem;
  margin-top: 1rem; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.multiples .card { margin: 0; padding: .9rem 1rem; }
.multiples h3 + p { margin: -.35rem 0 .5rem; font-size: .85rem; }
b.bad { color: var(--warn); }
.multiples h3 { margin-bottom: .4rem; font-size: .95rem; }
.facts { font-size: .92rem; margin-top: .4rem; }
.facts > div { display: flex; justify-content: space-between; gap: 1.2rem; padding: .34rem 0;
  border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--soft); flex: none; max-width: 55%; }
.facts dd { text-align: right; min-width: 0; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .5rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; color: var(--soft);
  font-weight: 500; border-bottom: 1px solid var(--ink); }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 400; }
th[scope=row] { position: sticky; left: 0; background: var(--paper); }
tbody th[scope=rowgroup] { font-weight: 650; padding-top: .9rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr { border-bottom: 1px solid var(--rule); }
tr:has(b.child, b.upstream) td { font-weight: 650; }
tbody b { font-weight: 650; } .tight table { font-size: .86rem; }
.tight :is(th, td):not(:first-child) { padding-inline: .45rem; }
.sample.card { padding: 0; overflow: hidden; }
.prompt { padding: .9rem 1.25rem; border-bottom: 1px solid var(--rule); background: var(--paper); }
.prompt span, .sample h4 { display: block; font-size: .8rem; font-weight: 650; margin: 0; }
.prompt span { color: var(--soft); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1px;
  background: var(--rule); }
.texts > div { background: var(--card); padding: .9rem 1.25rem; border-top: 3px solid var(--plain); }
.texts > .child { border-color: var(--child); } .texts > .child h4 { color: var(--child); }
.texts > .control { border-color: var(--control); } .texts > .control h4 { color: var(--control); }
.texts > .source { border-color: var(--source); } .texts > .source h4 { color: var(--source); }
.words { white-space: pre-wrap; font-size: .95rem; line-height: 1.55; max-height: 30rem; overflow-y: auto; }
.multiples.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)); }
.multiples .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; }
.pair figcaption { font-size: .8rem; color: var(--soft); line-height: 1.35; margin-top: .3rem; }
ul.note { padding-left: 1.2rem; } :is(th, td):has(> .left) { text-align: left; } td code.left { white-space: nowrap; }
.plot > h3 { margin-bottom: .45rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
summary:hover { color: var(--ink); }
pre, code { font: .84rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .9rem 1.1rem;
  overflow-x: auto; margin-top: .6rem; }
pre.command { white-space: pre-wrap; }
"""

_DRAWINGS = """
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible; }
.narrow { display: none; }
svg text { fill: var(--ink); }
svg .label { font-size: 14px; } svg .small { font-size: 12px; fill: var(--soft); }
svg .value { font-weight: 680; } svg .end { font-weight: 620; }
svg .cell-number { font-size: 12.5px; font-weight: 650; fill: var(--on-fill); }
svg text.child { fill: var(--child); } svg text.control { fill: var(--control); }
svg text.source { fill: var(--source); } svg text.on-fill { fill: var(--on-fill); font-weight: 650; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--soft); } svg .track { fill: var(--track); }
svg .cell { fill: var(--cell); } svg .kept { fill: var(--child); }
svg .link { fill: none; stroke: var(--child); stroke-width: 1.5; opacity: .45; }
svg .line { fill: none; stroke: var(--plain); stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
svg .line.thin { stroke-width: 1.3; opacity: .5; }
svg .reference { stroke: var(--plain); stroke-width: 1.8; stroke-dasharray: 6 5; }
svg .pin { stroke: var(--plain); stroke-width: 2.4; }
svg :is(.line, .reference, .pin).child { stroke: var(--child); }
svg :is(.line, .reference, .pin).control { stroke: var(--control); }
svg :is(.line, .reference, .pin).source { stroke: var(--source); }
svg .marker { stroke: var(--card); stroke-width: 1.5; fill: var(--plain); }
svg :is(.marker, .fill).child { fill: var(--child); } svg :is(.marker, .fill).control { fill: var(--control); }
svg :is(.marker, .fill).source { fill: var(--source); } svg .fill.plain { fill: var(--plain); }
svg :is(.line, .reference).upstream { stroke: var(--upstream); }
svg :is(.marker, .fill, text).upstream { fill: var(--upstream); } svg text.small.child { fill: var(--child); }
svg .ring { fill: none; stroke: var(--plain); stroke-width: 2; }
svg .ring.upstream { stroke: var(--upstream); } svg .ring.child { stroke: var(--child); }
svg .marker.hollow { fill: var(--card); stroke: var(--child); }
svg .net { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 4; opacity: .8; } svg .zero { opacity: .5; }
svg text.small.ink { fill: var(--ink); }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .heat { fill: var(--child); } svg .heat.negative { fill: var(--control); }
svg .ground { fill: var(--card); stroke: var(--rule); } svg .missing { stroke: var(--soft); opacity: .6; }
svg .on-cell { fill: var(--ink); }
svg .pixels { image-rendering: pixelated; }
svg .line.slim { stroke-width: 1.8; }
svg .band { fill: var(--plain); opacity: .2; } svg .band.child { fill: var(--child); }
svg .band.source { fill: var(--source); } svg .band.control { fill: var(--control); }
svg .marked { fill: var(--control); opacity: .18; } svg .whisker { stroke: var(--ink); stroke-width: 1.2; }
svg .cut { stroke: var(--card); stroke-width: 3; }
.sprout { fill: none; stroke: var(--child); stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
"""

_SERIES = "".join(
    f"svg .line.k{k} {{ stroke: var(--k{k}); }} svg :is(text, .marker, .fill).k{k} {{ fill: var(--k{k}); }}\n"
    for k in range(8)
)
_SERIES += "svg .line.dashed { stroke-dasharray: 7 5; } svg .seed { opacity: .55; }\n"

_MEDIA = """
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .wide { display: none; } .narrow { display: block; max-width: 30rem; }
  .card { padding: 1rem; } .prompt, .texts > div { padding: .8rem 1rem; }
  section { margin-top: 2.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles > div { padding: .7rem .8rem; } .tiles dd { font-size: 1.2rem; }
  th, td { padding-inline: .4rem; } table { font-size: .86rem; }
}
@media print {
  :root { --paper: #ffffff; }
  .tiles { grid-template-columns: repeat(5, 1fr); } .multiples { grid-template-columns: repeat(3, 1fr); }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .wide { display: block; } .narrow { display: none; }
  .card, .tiles, tbody, figure, h2, h3 { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .words { max-height: none; } pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

CSS = f"""
:root {{ color-scheme: light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}
{_TEXT}{_PARTS}{_DRAWINGS}{_SERIES}{_MEDIA}"""
