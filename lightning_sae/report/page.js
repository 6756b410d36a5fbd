"use strict";

const $ = (id) => document.getElementById(id);
const ROW = 28; // pixels, as in the style

/** An element with attributes, and children: elements or texts. Texts are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The same of SVG. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const short = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3
    ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const share = (value) => (value === 0 ? "0" : value >= 0.0001 ? `${short(100 * value)} %` : `${value.toExponential(1)}`);
const whole = (value) => value.toLocaleString("en");
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ {3,}/g, (run) => `␣${run.length}`);

async function unpack() {
  const packed = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function definitions(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) {
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
  return list;
}

const token = (data, number) => make("span", { class: "token" }, visible(data.tokens[number]) || "∅");
const word = (data, number) => make("span", { class: "token" }, visible(data.tokens[number].trim() || data.tokens[number]));

/** The tokens on which a feature has its highest values, each once. */
function peaks(data, feature) {
  return [...new Set(data.top[feature].map(([context, position]) => data.contexts[context][position]))];
}

// Plots

/** The frame of a plot with logarithmic or linear axes, and functions to place what is in it. */
function frame({ x, y, xTicks, yTicks, xLabel, width = 460, height = 240 }) {
  const left = 46, right = 8, top = 10, bottom = 34;
  const at = (value, [low, high], from, to) => from + ((value - low) / (high - low || 1)) * (to - from);
  const px = (value) => at(value, x, left, width - right);
  const py = (value) => at(value, y, height - bottom, top);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const [value, label] of yTicks) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: py(value), y2: py(value) }));
    svg.append(draw("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, label));
  }
  for (const [value, label] of xTicks) {
    svg.append(draw("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, label));
  }
  svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: py(y[0]), y2: py(y[0]) }));
  svg.append(draw("text", { x: width - right, y: height - 2, "text-anchor": "end" }, xLabel));
  return { svg, px, py };
}

const powers = (low, high) =>
  Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => Math.ceil(low) + i)
    .map((power) => [power, power >= 0 && power < 4 ? whole(10 ** power) : power < 0 && power > -4 ? String(10 ** power) : `1e${power}`]);

function bars(counts, edges, xTicks, xLabel, size = {}) {
  const most = Math.max(1, ...counts);
  const { svg, px, py } = frame({
    x: [edges[0], edges[edges.length - 1]], y: [0, most], xTicks,
    yTicks: [[0, "0"], [most, most >= 1e5 ? short(most) : whole(most)]], xLabel, ...size,
  });
  counts.forEach((count, i) => {
    if (!count) return;
    const bar = draw("rect", {
      class: "bar", x: px(edges[i]) + 0.5, width: Math.max(1, px(edges[i + 1]) - px(edges[i]) - 1),
      y: py(count), height: py(0) - py(count),
    });
    bar.append(draw("title", {}, whole(count)));
    svg.append(bar);
  });
  return svg;
}

function densityPlot(data) {
  const logs = data.count.filter((count) => count > 0).map((count) => Math.log10(count / data.read));
  if (!logs.length) return make("p", { class: "none" }, "No feature fired.");
  const low = Math.floor(Math.min(...extent(logs))), high = Math.min(0, Math.ceil(Math.max(...extent(logs)) + 1e-9));
  const steps = 8 * Math.max(1, high - low), counts = Array(steps).fill(0);
  for (const log of logs) counts[Math.min(steps - 1, Math.floor((log - low) * 8))] += 1;
  const edges = counts.map((_, i) => low + i / 8).concat(Math.max(high, low + 1));
  return bars(counts, edges, powers(low, Math.max(high, low + 1)), "share of tokens on which a feature fires");
}

const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

function rankPlot(data, byDensity) {
  const live = byDensity.filter((feature) => data.count[feature] > 0);
  if (live.length < 2) return make("p", { class: "none" }, "Too few features fired.");
  const log = (rank) => Math.log10(data.count[live[rank]] / data.read);
  const y = [Math.floor(log(live.length - 1)), Math.min(0, Math.ceil(log(0)))];
  const x = [0, Math.log10(live.length)];
  const { svg, px, py } = frame({ x, y, xTicks: powers(...x), yTicks: powers(...y), xLabel: "rank by density" });
  const ranks = [...new Set(Array.from({ length: 300 }, (_, i) => Math.round(live.length ** (i / 299)) - 1))];
  const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  svg.append(draw("path", { class: "curve", d: path(ranks.map((rank) => [px(Math.log10(rank + 1)), py(log(rank))])) }));
  if (data.law) {
    const [scale, exponent, offset] = data.law;
    const points = ranks.map((rank) => [rank + 1, Math.log10(scale / (rank + 1 + offset) ** exponent)]);
    svg.append(draw("path", {
      class: "law", d: path(points.filter(([, value]) => value >= y[0]).map(([rank, value]) => [px(Math.log10(rank)), py(value)])),
    }));
    svg.append(draw("text", { class: "law-label", x: px(0) + 8, y: py(y[0]) - 8 },
      `${short(scale)} / (rank + ${short(offset)}) ^ ${short(exponent)}`));
  }
  svg.classList.add("link");
  svg.append(draw("title", {}, "Click for the feature of this rank"));
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const rank = Math.round(10 ** (((inside - px(0)) / (px(x[1]) - px(0))) * x[1]));
    location.hash = `feature=${live[Math.max(0, Math.min(live.length, rank) - 1)]}`;
  });
  return svg;
}

function valuePlot(data, feature) {
  const counts = data.histogram[feature], width = data.binWidth[feature];
  const used = counts.findLastIndex((count) => count > 0) + 1;
  const edges = Array.from({ length: used + 1 }, (_, i) => i * width);
  const end = edges[used];
  return bars(counts.slice(0, used), edges, [0, end / 2, end].map((value) => [value, short(value)]), "value", { width: 270, height: 225 });
}

// A feature

function example(data, feature, [context, position, fires]) {
  const [before, after] = data.window, tokens = data.contexts[context], values = new Map();
  for (let i = 0; i < fires.length; i += 2) values.set(fires[i], fires[i + 1]);
  const text = make("span", { class: "text" });
  const first = Math.max(0, position - before), last = Math.min(tokens.length - 1, position + after);
  if (first > 0) text.append(make("i", {}, "… "));
  for (let at = first; at <= last; at += 1) {
    const value = values.get(at - position) ?? 0;
    const span = make("span", {}, data.tokens[tokens[at]].replace(/\n/g, "↵"));
    if (value > 0) {
      const strength = Math.min(1, value / data.maximum[feature]);
      span.style.background = `rgb(var(--shade) / calc(${(0.12 + 0.88 * strength).toFixed(3)} * var(--most)))`;
      span.title = String(value);
    }
    if (at === position) span.className = "peak";
    text.append(span);
  }
  if (last < tokens.length - 1) text.append(make("i", {}, " …"));
  return make("div", { class: "example" }, make("span", {}, short(values.get(0))), text);
}

function heading(title, remark) {
  return make("h3", {}, title, ...(remark ? [make("small", {}, remark)] : []));
}

function list(kind, rows) {
  const most = Math.max(...rows.map(([, value]) => Math.abs(value)));
  const items = rows.map(([name, value]) => {
    const meter = make("span", { class: "meter" });
    meter.style.width = `${Math.round((32 * Math.abs(value)) / most)}px`;
    return make("li", {}, make("span", { class: "name", title: name.textContent }, name), meter, make("span", { class: "value" }, short(value)));
  });
  return make("ul", { class: `list ${kind}` }, ...items);
}

function showFeature(data, feature, step) {
  const count = data.count[feature], state = data.state[feature], section = $("feature");
  const title = make("div", { class: "heading" }, make("h2", {}, `Feature ${feature}`));
  if (state !== "live") title.append(make("span", { class: `tag ${state}` }, state));
  const steps = make("span", { class: "steps" });
  for (const [label, by, hint] of [["←", -1, "Previous in the table"], ["→", 1, "Next in the table"]]) {
    const button = make("button", { title: hint, "aria-label": hint }, label);
    button.addEventListener("click", () => step(by));
    steps.append(button);
  }
  title.append(steps);
  section.replaceChildren(title, definitions(count ? [
    ["fires on", `${whole(count)} tokens (${share(count / data.read)})`],
    ["highest value", short(data.maximum[feature])],
    ["mean value", short(data.mean[feature])],
  ] : [["fires on", `none of ${whole(data.read)} tokens`]]));

  const columns = make("div", { class: "columns" });
  const column = (...children) => columns.append(make("div", {}, ...children));
  if (count > 0) column(heading("Values where it fires"), valuePlot(data, feature));
  for (const [name, kind] of [["promoted", "up"], ["demoted", "down"]]) {
    if (!data[name]) continue;
    const rows = data[name][feature].map((number, i) => [token(data, number), data[`${name}Logits`][feature][i]]);
    column(heading(name === "promoted" ? "Tokens it promotes" : "Tokens it demotes"), list(kind, rows));
  }
  const nearest = data.nearest[feature].map((other, i) => {
    const link = make("a", { href: `#feature=${other}` }, String(other));
    return [make("span", {}, link, " ", ...peaks(data, other).slice(0, 2).map((each) => token(data, each))), data.cosines[feature][i]];
  });
  column(heading("Nearest features", "cosine"), list("", nearest));
  section.append(columns);

  if (count === 0) return;
  section.append(heading("Top contexts", "each at its highest value"));
  section.append(...data.top[feature].map((each) => example(data, feature, each)));
  ["strongest", "second", "third", "weakest"].forEach((name, i) => {
    const examples = data.quarters[feature][i];
    if (!examples.length) return;
    section.append(heading(`From the ${name} quarter of its firings`, "drawn at random"));
    section.append(...examples.map((each) => example(data, feature, each)));
  });
}

// The table: only the rows in sight are there

function table(data) {
  const all = data.count.map((_, feature) => feature);
  const columns = [
    ["feature", (feature) => feature], ["fires most on", (feature) => data.tokens[peaks(data, feature)[0]]?.trim().toLowerCase() ?? "\uffff"],
    ["density", (feature) => data.count[feature]], ["highest", (feature) => data.maximum[feature]],
  ];
  const state = { column: 2, descending: true, shown: all, current: null };

  const words = all.map(() => null);
  const searched = (feature) => (words[feature] ??= [...peaks(data, feature), ...(data.promoted?.[feature] ?? [])]
    .map((number) => data.tokens[number].toLowerCase()).join("\u0000"));

  function arrange() {
    const wanted = $("search").value.toLowerCase(), kind = $("state").value;
    const number = /^\d+$/.test(wanted.trim()) ? Number(wanted) : null;
    const fits = (feature) => (!kind || data.state[feature] === kind)
      && (!wanted || feature === number || searched(feature).includes(wanted));
    const key = columns[state.column][1], keys = all.map(key), sign = state.descending ? -1 : 1;
    state.shown = all.filter(fits).sort((a, b) =>
      (number !== null && (b === number) - (a === number)) || sign * (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0) || a - b);
    $("found").textContent = state.shown.length === all.length ? `${whole(all.length)} features` : `${whole(state.shown.length)} of ${whole(all.length)} features`;
    $("scroll").scrollTop = 0;
    fill();
  }

  function fill() {
    const scroll = $("scroll"), first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 10);
    const last = first + Math.ceil(scroll.clientHeight / ROW) + 20;
    $("rows").style.height = `${state.shown.length * ROW}px`;
    $("rows").replaceChildren(...state.shown.slice(first, last).map((feature, i) => {
      const names = make("span", {}, ...peaks(data, feature).slice(0, 4).map((each) => word(data, each)));
      const row = make("a", { class: "row", href: `#feature=${feature}` },
        make("span", {}, String(feature)), names, make("span", {}, share(data.count[feature] / data.read)), make("span", {}, short(data.maximum[feature])));
      row.style.top = `${(first + i) * ROW}px`;
      if (feature === state.current) row.setAttribute("aria-current", "true");
      return row;
    }));
  }

  function head() {
    $("head").replaceChildren(...columns.map(([name], i) => {
      const button = make("button", {}, name, i === state.column ? (state.descending ? " ↓" : " ↑") : "");
      button.addEventListener("click", () => {
        state.descending = i === state.column ? !state.descending : i > 1;
        state.column = i;
        head();
        arrange();
      });
      const cell = make("span", {}, button);
      if (i === state.column) cell.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      return cell;
    }));
  }

  function select(feature) {
    state.current = feature;
    const place = state.shown.indexOf(feature), scroll = $("scroll");
    const inSight = place * ROW >= scroll.scrollTop && (place + 1) * ROW <= scroll.scrollTop + scroll.clientHeight;
    if (place >= 0 && !inSight) scroll.scrollTop = place * ROW - scroll.clientHeight / 2;
    fill();
  }

  function step(by) {
    const place = state.shown.indexOf(state.current) + by;
    if (place >= 0 && place < state.shown.length) location.hash = `feature=${state.shown[place]}`;
  }

  $("search").addEventListener("input", arrange);
  $("state").addEventListener("change", arrange);
  $("scroll").addEventListener("scroll", fill);
  addEventListener("resize", fill);
  head();
  arrange();
  return { select, step };
}

// The page

function about(data) {
  const tables = Object.entries(data.about).filter(([, rows]) => Object.keys(rows).length).map(([name, rows]) =>
    make("table", {}, make("caption", {}, name), ...Object.entries(rows).map(([key, value]) =>
      make("tr", {}, make("th", {}, key), make("td", {}, typeof value === "number" ? (Number.isInteger(value) ? whole(value) : short(value)) : String(value))))));
  return make("div", { class: "tables" }, ...tables);
}

function overview(data) {
  const byDensity = data.count.map((_, feature) => feature).sort((a, b) => data.count[b] - data.count[a]);
  const plot = (title, remark, svg) => make("div", {}, heading(title, remark), svg);
  $("overview").replaceChildren(make("div", { class: "plots" },
    plot("Densities", "of the features that fire", densityPlot(data)),
    plot("Density by rank", data.law ? "dashed: the Zipf-Mandelbrot law that fits" : "", rankPlot(data, byDensity))),
  make("p", { class: "none" }, "Choose a feature from the table, or a rank from the plot."), about(data));
}

async function main() {
  const data = await unpack();
  const number = (state) => data.state.filter((each) => each === state).length;
  const firings = data.count.reduce((sum, count) => sum + count, 0);
  $("figures").replaceChildren(...definitions([
    ["features", whole(data.count.length)], ["dead", whole(number("dead"))], ["dying", whole(number("dying"))],
    ["L0", short(firings / data.read)], ["tokens read", whole(data.read)],
  ]).children);
  $("title").replaceChildren(make("a", { href: "#" }, data.title));
  overview(data);
  const { select, step } = table(data);
  $("message").remove();

  function show() {
    const found = /^#feature=(\d+)$/.exec(location.hash), feature = found && Number(found[1]);
    const known = feature !== null && feature < data.count.length;
    $("overview").hidden = known;
    $("feature").hidden = !known;
    if (known) showFeature(data, feature, step);
    document.title = known ? `Feature ${feature} · ${data.title}` : data.title;
    select(known ? feature : null);
    document.querySelector("article").scrollTop = 0;
  }
  addEventListener("hashchange", show);
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  });
  show();
}

main().catch((error) => { ($("message") ?? $("found")).textContent = `This page needs a browser of 2023 or later: ${error.message}`; });
