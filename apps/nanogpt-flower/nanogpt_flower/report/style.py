"""The CSS of all pages."""

# The colors of series are distinct for color-blind readers, and each also differs in its dashes or
# its width.
CSS = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --soft: #68645c; --rule: #e3dfd6;
  --blue: #1a5fa8; --orange: #c4570e; --green: #23796a; --purple: #7a4fa3; --gold: #b98a16;
  --grey: #85817a; --tint: #f3efe4; --good: #23796a; --bad: #b3362c;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia,
    "Noto Serif", "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --card: #1c1e23; --ink: #e9e6df; --soft: #a3a099; --rule: #30323a;
    --blue: #79b5f2; --orange: #f59a58; --green: #5cc7b0; --purple: #bf9be6; --gold: #e3bc55;
    --grey: #96938c; --tint: #262721; --good: #5cc7b0; --bad: #f08578;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--sans); overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: 44px 40px 72px; }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.2; margin: 0; }
h1 { font-size: 38px; letter-spacing: -0.01em; }
h2 { font-size: 25px; }
h3 { font-size: 17px; margin: 28px 0 8px; }
p { margin: 10px 0; max-width: 46em; }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: 3px; }
bdi, td, th { unicode-bidi: isolate; }
code, .mono { font-family: var(--mono); font-size: 0.875em; }
.soft, .note { color: var(--soft); }
.note { font-size: 14px; }
section { margin-top: 60px; }
section > h2 { padding-bottom: 10px; border-bottom: 1px solid var(--rule); margin-bottom: 18px; }

.eyebrow {
  margin: 0 0 8px; color: var(--soft); font-size: 13px; letter-spacing: 0.06em;
}
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 10px 18px; }
.state {
  padding: 2px 12px; border: 1px solid; border-radius: 99px; font-size: 14px; color: var(--soft);
}
.state.completed { color: var(--good); }
.state.failed, .state.interrupted { color: var(--bad); }
.state.running { color: var(--blue); }
.facts { color: var(--soft); margin: 12px 0 0; max-width: none; }
.facts span + span::before { content: "·"; margin: 0 9px; }
nav { margin-top: 16px; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.lead { font-family: var(--serif); font-size: 20px; line-height: 1.5; margin: 26px 0 0; }
.alert { border-left: 3px solid var(--bad); padding-left: 14px; margin-top: 22px; }

.cards {
  display: grid; grid-template-columns: repeat(var(--cards, 5), 1fr); gap: 1px; margin: 30px 0 0;
  padding: 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden;
}
.cards > div { background: var(--card); padding: 16px 18px 15px; }
.cards dt { color: var(--soft); font-size: 13.5px; }
.cards dd { margin: 0; }
.cards .figure {
  font-family: var(--serif); font-size: 30px; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: lining-nums;
}
.cards .under { color: var(--soft); font-size: 13px; line-height: 1.45; }

.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 44px; }
.chart { margin: 14px 0 0; min-width: 0; }
.plot { margin: 10px 20px 30px 50px; }
.lines .plot { margin-right: 136px; }
.plot > svg { display: block; overflow: visible; }
.plot text { font: 12px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot text.y { text-anchor: end; dominant-baseline: central; transform: translateX(-9px); }
.plot text.x { text-anchor: middle; }
.plot text.end { dominant-baseline: central; font-weight: 600; }
.axis { margin: 0; color: var(--soft); font-size: 12.5px; }
.axis.below { text-align: center; margin-top: -8px; }
.lines .axis.below { margin-right: 88px; }
.legend {
  list-style: none; margin: 0 0 8px; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px;
  font-size: 13.5px;
}
.legend svg { vertical-align: -1px; margin-right: 7px; overflow: visible; }
.grid, .tick { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2.4; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.line.faint { stroke-width: 1.1; opacity: 0.5; }
.line.server { stroke: var(--blue); }
.line.mean, .line.client { stroke: var(--orange); }
.line.train { stroke: var(--green); stroke-width: 1.8; stroke-dasharray: 6 4; }
.line.original { stroke: var(--grey); stroke-width: 1.8; stroke-dasharray: 2 3; }
.line.nanogpt { stroke: var(--purple); stroke-width: 1.6; stroke-dasharray: 9 4; }
.dot { stroke: var(--paper); stroke-width: 1.5; }
.dot.server { fill: var(--blue); }
.dot.mean, .dot.client { fill: var(--orange); }
.dot.train { fill: var(--green); }
.dot.original { fill: var(--grey); }
.plot text.server { fill: var(--blue); }
.plot text.mean { fill: var(--orange); }
.plot text.train { fill: var(--green); }
.plot text.nanogpt { fill: var(--purple); }
.dot.blue { fill: var(--blue); }
.dot.orange { fill: var(--orange); }
.dot.grey { fill: var(--grey); }
.span { stroke: var(--rule); stroke-width: 3; }
.plot text.name { fill: var(--ink); }
.dots .plot { margin-left: 14px; }
.bar { stroke: var(--paper); stroke-width: 0.6; }
.bar.blue { fill: var(--blue); }
.bar.orange { fill: var(--orange); }
.bar.gold { fill: var(--gold); }
.bar.purple { fill: var(--purple); }
.bar.green { fill: var(--green); }
.bar.grey { fill: var(--grey); }
.outline { fill: none; stroke: var(--grey); stroke-dasharray: 3 2; }
.spark { width: 92px; height: 24px; vertical-align: middle; margin-right: 10px; }
.spark .line { stroke-width: 1.5; }
.share {
  display: inline-block; width: 72px; height: 7px; margin-left: 10px; border-radius: 4px;
  background: var(--rule); vertical-align: 1px; overflow: hidden;
}
.share i { display: block; height: 100%; background: var(--blue); }

.scroll { overflow-x: auto; margin: 14px 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 22px 6px 0; text-align: left; vertical-align: baseline; }
th { font-weight: 500; color: var(--soft); font-size: 13px; }
thead th { border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody th { color: inherit; font-size: inherit; font-weight: 400; white-space: nowrap; }
tfoot > tr > * { border-top: 2px solid var(--rule); font-weight: 600; color: inherit; }
tfoot th { font-size: inherit; }
.number { text-align: right; white-space: nowrap; }
.words { min-width: 16em; overflow-wrap: anywhere; }
tr.changed { background: var(--tint); }
tr.changed > :first-child { box-shadow: inset 3px 0 var(--gold); padding-left: 12px; }
tbody th small { display: inline-block; min-width: 16em; white-space: normal; }
td small, th small { color: var(--soft); font-size: 12.5px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--blue); }

.sample {
  font: 16.5px/1.6 var(--serif); white-space: pre-wrap; margin: 0; overflow-wrap: anywhere;
}
.sample.final {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 22px 28px; columns: 2 340px; column-gap: 48px;
}
.samples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 16px;
  margin-top: 16px;
}
.samples > article {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 13px 18px;
}
.samples header {
  display: flex; justify-content: space-between; color: var(--soft); font-size: 13px;
  margin-bottom: 7px;
}
.samples .sample { font-size: 14.5px; line-height: 1.5; }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--rule); }

@media (max-width: 1000px) {
  .cards { grid-template-columns: repeat(6, 1fr); }
  .cards > div { grid-column: span 2; }
  .cards > div:nth-child(-n + 2) { grid-column: span 3; }
  .pair { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 640px) {
  main { padding: 26px 16px 48px; }
  h1 { font-size: 29px; }
  h2 { font-size: 22px; }
  section { margin-top: 44px; }
  .lead { font-size: 18px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards > div, .cards > div:nth-child(-n + 2) { grid-column: auto; padding: 12px 14px; }
  .cards > div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .cards .figure { font-size: 25px; }
  .plot { margin-right: 14px; margin-left: 42px; }
  .lines .plot { margin-right: 14px; }
  .plot text.end { display: none; }
  .lines .axis.below { margin-right: 0; }
  .sample.final { padding: 16px 18px; }
  .samples { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --rule: #ccc; --tint: #f4f1e8;
    --blue: #1a5fa8; --orange: #c4570e; --green: #23796a; --purple: #7a4fa3; --gold: #b98a16;
    --grey: #777; --good: #23796a; --bad: #b3362c;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { margin-top: 30px; }
  h2, h3 { break-after: avoid; }
  .chart, .cards, .samples > article, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; }
  .scroll { overflow: visible; }
  table { font-size: 9.5pt; }
}
"""
