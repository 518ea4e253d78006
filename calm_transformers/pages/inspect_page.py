"""Renders an inspected text as a self-contained HTML page with a temperature slider and no network requests."""

import json

# The browser may load nothing: style and script are inline.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root {
  color-scheme: light dark;
  --ground: light-dark(#fbfaf7, #15171b); --card: light-dark(#ffffff, #1e2127); --ink: light-dark(#1d1f24, #e7e6e2);
  --soft: light-dark(#62666f, #a4aab5); --line: light-dark(#e2dfd8, #343942);
  --even: light-dark(#e4eefb, #22344c); --odd: light-dark(#fdeed9, #45351e);
  --bar: light-dark(#3671c6, #6da6f2); --chosen: light-dark(#c05f14, #f0a35b);
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1.25rem 3rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .875rem; }
header p { margin: .3rem 0 0; max-width: 54rem; }
.control { display: flex; align-items: center; gap: .35rem .9rem; margin: 1rem 0; padding: .1rem .9rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.control output { font-variant-numeric: tabular-nums; font-weight: 600; min-width: 2.6rem; }
.control input { flex: 1 1 11rem; accent-color: var(--chosen); min-width: 6rem; height: 2.75rem; cursor: pointer; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) 25rem; gap: 1.5rem; align-items: start; }
#text { font: 1.2rem/2.1 Georgia, "Times New Roman", serif; white-space: pre-wrap; overflow-wrap: anywhere; }
.patch { --weight: 0; padding: .12em 0 .3em; border-radius: .2em; cursor: pointer;
  -webkit-box-decoration-break: slice; box-decoration-break: slice;
  background: linear-gradient(var(--chosen) 0 0) left bottom / calc(var(--weight) * 100%) 3px no-repeat, var(--even); }
.patch.odd { background-color: var(--odd); }
.patch.prompt { color: var(--soft); }
.patch i::before { content: "↵"; color: var(--soft); font-style: normal; }
.patch:hover, .patch.current { outline: 2px solid var(--bar); outline-offset: 0; }
#panel { position: sticky; top: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem; max-height: calc(100vh - 2rem); overflow: auto; }
#panel h2 { font-size: 1rem; margin: 0 0 .1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; margin-top: .6rem; font-size: .9rem; }
th { text-align: right; font-weight: normal; color: var(--soft); font-size: .8rem; padding: 0 0 .2rem .5rem; }
th:first-child { text-align: left; padding-left: 0; }
td { padding: .22rem 0 .22rem .5rem; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { text-align: left; padding-left: 0; max-width: 9rem; }
code { font: .9em ui-monospace, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: color-mix(in srgb, var(--ink) 8%, transparent); padding: .05em .2em; border-radius: .2em; }
tr.chosen code { background: color-mix(in srgb, var(--chosen) 30%, transparent); font-weight: 600; }
.track { position: relative; display: block; width: 6.5rem; height: .65rem; border-radius: .2rem;
  background: color-mix(in srgb, var(--ink) 9%, transparent); }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: .2rem; background: var(--bar); }
tr.chosen .track i { background: var(--chosen); }
@media (max-width: 56rem) {
  .columns { display: block; }
  main { padding: .9rem .9rem 46vh; }
  header p { font-size: .9rem; }
  #panel { position: fixed; inset: auto 0 0; top: auto; max-height: 40vh; border-radius: .8rem .8rem 0 0; z-index: 1;
    box-shadow: 0 -4px 18px rgb(0 0 0 / .18); }
  .control { position: sticky; top: 0; z-index: 1; margin: .7rem 0; }
  #text { font-size: 1.1rem; }
  .track { width: 24vw; }
}
"""

# candidateWeights() computes candidate_weights of generation_calm_algorithms.py, with truncation, from counts.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const textTemperature = data.settings.temperature, maxShown = 40;
const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const find = id => document.getElementById(id);

// Normalised weights C(count, 1/T); if all are 0, of the largest counts.
function candidateWeights(counts, temperature, {top_k = 0, top_p = 1, min_p = 0} = {}) {
  const numSamples = counts.reduce((a, b) => a + b, 0);
  let s = 1 / temperature;
  if (Math.abs(s - Math.round(s)) <= 1e-6 * s) s = Math.round(s);
  // log C(count, s) up to a constant, from C(i, s) / C(i - 1, s) = i / (i - s); very low if the weight is 0.
  const logWeight = count => {
    if (count <= s - 1) return (count - numSamples - 1) * 1000;
    let sum = 0;
    for (let i = Math.floor(s) + 1; i <= count; i++) sum += Math.log(i / (i - s));
    return sum;
  };
  const singletons = counts.filter(c => c === 1).length, doubletons = counts.filter(c => c === 2).length;
  const unseen = temperature > 1 ? Math.max(singletons - 1, 0) / (2 * (doubletons + 1)) * Math.exp(logWeight(0)) : 0;
  const logs = counts.map(c => c === 1 && unseen > 0 ? Math.log(Math.exp(logWeight(1)) + unseen) : logWeight(c));
  const maxLog = Math.max(...logs);
  let weights = normalised(logs.map(value => Math.exp(value - maxLog)));
  let order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b);
  if (top_k > 0) order = order.slice(0, top_k);
  if (top_p < 1) {
    const total = order.reduce((sum, i) => sum + weights[i], 0);
    let before = 0;
    order = order.filter((i, rank) => {
      before += weights[i];
      return !rank || before - weights[i] < top_p * total;
    });
  }
  if (min_p > 0) order = order.filter(i => weights[i] >= min_p * weights[order[0]]);
  const kept = new Set(order);
  return normalised(weights.map((weight, i) => kept.has(i) ? weight : 0));
}
function normalised(values) {
  const sum = values.reduce((a, b) => a + b, 0);
  return values.map(value => value / sum);
}

const visible = text => text.replaceAll("\\n", "↵").replaceAll("\\t", "⇥") || "∅";
const percent = value => value >= 0.9995 ? "100 %" : value >= 0.0005 ? (100 * value).toFixed(1) + " %" : "0 %";
let temperature = textTemperature, current = null;

function showPanel() {
  const panel = find("panel"), patch = data.patches[current];
  const facts = [`patch ${current + 1} of ${data.patches.length}`];
  facts.push(patch.is_prompt ? "prompt" : "generated");
  const rows = [], counts = patch.candidates.map(candidate => candidate.count);
  if (counts.length) {
    const numSamples = counts.reduce((a, b) => a + b, 0);
    facts.push(`${counts.length} distinct in ${numSamples} samples`);
    if (patch.is_prompt && patch.chosen === null) facts.push("the prompt's patch was not sampled");
    const weights = candidateWeights(counts, temperature, data.settings);
    const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b).slice(0, maxShown);
    if (patch.chosen !== null && !order.includes(patch.chosen)) order.push(patch.chosen);
    for (const i of order) {
      const {text, count} = patch.candidates[i];
      const track = element("span", {class: "track"}, element("i", {style: `width:${100 * weights[i]}%`}));
      rows.push(element("tr", i === patch.chosen ? {class: "chosen"} : {},
        element("td", {}, element("code", {}, visible(text))),
        element("td", {}, String(count)), element("td", {}, track),
        element("td", {class: "weight"}, percent(weights[i]))));
    }
  }
  const head = element("tr", {}, element("th", {}, "candidate"), element("th", {}, "count"),
    element("th", {colspan: 2}, `weight at T = ${temperature.toFixed(2)}`));
  panel.replaceChildren(element("h2", {}, element("code", {}, visible(patch.text))),
    element("div", {class: "soft"}, facts.join(" · ")));
  if (rows.length) panel.append(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  else panel.append(element("p", {class: "soft"}, "The first patch is not predicted."));
  if (counts.length > maxShown) panel.append(element("p", {class: "soft"}, `The first ${maxShown} are shown.`));
}

function choose(index) {
  if (current !== null) spans[current].classList.remove("current");
  current = Math.min(Math.max(index, 0), spans.length - 1);
  spans[current].classList.add("current");
  showPanel();
}

function setTemperature(value) {
  temperature = value;
  find("slider").value = value;
  find("value").textContent = value.toFixed(2);
  data.patches.forEach((patch, i) => {
    if (patch.chosen === null) return;
    const counts = patch.candidates.map(candidate => candidate.count);
    const weights = candidateWeights(counts, temperature, data.settings);
    spans[i].style.setProperty("--weight", weights[patch.chosen].toFixed(4));
  });
  if (current !== null) showPanel();
}

const spans = data.patches.map((patch, i) => {
  const span = element("span", {class: `patch${i % 2 ? " odd" : ""}${patch.is_prompt ? " prompt" : ""}`},
    ...patch.text.split(/(?=\\n)/).flatMap(part => part.startsWith("\\n") ? [element("i"), part] : [part]));
  span.addEventListener("mouseenter", () => choose(i));
  span.addEventListener("click", () => choose(i));
  return span;
});
find("text").append(...spans);
const {temperature: T, num_candidates: N, seed, top_k, top_p, min_p} = data.settings;
document.title = find("title").textContent = `${data.model}: a text, patch by patch`;
find("size").textContent = data.patch_size;
find("settings").textContent = [
  `generated at T = ${T}`, `${N} samples per patch`, `seed ${seed}`,
  ...(top_k ? [`top-k ${top_k}`] : []), ...(top_p < 1 ? [`top-p ${top_p}`] : []),
  ...(min_p ? [`min-p ${min_p}`] : []),
].join(" · ");
find("slider").addEventListener("input", event => setTemperature(Number(event.target.value)));
setTemperature(textTemperature);
choose(Math.min(data.patches.filter(patch => patch.is_prompt).length, data.patches.length - 1));
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>Candidates of each patch</title>
<style>{style}</style>
<main>
<header><h1 id="title"></h1>
<p>An ordinary language model generates one token, a word or a piece of one, per step; this one generated a patch of
<span id="size"></span> tokens per step. Each tint is a patch: hover over it or tap it to see which patches were
sampled for its place, how often, and with which weight one of them was chosen.</p>
<p class="soft" id="settings"></p></header>
<div class="control"><label for="slider">Temperature</label>
<input type="range" id="slider" min="0.1" max="2" step="0.01"><output id="value" for="slider"></output></div>
<div class="columns"><div>
<div id="text"></div>
<p class="soft">Gray text is the prompt. The line under a patch is its weight among the candidates at this temperature.
The slider recomputes the weights of the same samples; the text does not change.</p>
</div><aside id="panel" aria-live="polite"></aside></div>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</html>
"""


def render_page(inspection: dict) -> str:
    """Returns the HTML page of an `Inspection` as a dictionary."""
    data = json.dumps(inspection, ensure_ascii=False).replace("<", "\\u003c")  # no text can close the script tag
    return PAGE.format(policy=POLICY, style=STYLE, data=data, script=SCRIPT)
