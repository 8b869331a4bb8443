"use strict";
// Draws the figures of a report page from its own data, and moves what its switches and sliders say.
const page = JSON.parse(document.getElementById("data").textContent);
const options = {responsive: true, displayModeBar: false, displaylogo: false, showTips: false, plotlyServerURL: "", scrollZoom: false};

// Colours are names of CSS variables: what light or dark makes of them now.
function coloured(value, style) {
  if (Array.isArray(value)) return value.map(one => coloured(one, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, style)]));
  }
  const name = typeof value === "string" && /^var\((--[a-z0-9-]+)\)$/.exec(value);
  return name ? style.getPropertyValue(name[1]).trim() : value;
}

const axis = {gridcolor: "var(--grid)", linecolor: "var(--rule)", zeroline: false, automargin: true, showline: true, ticks: "outside", tickcolor: "var(--rule)"};
const usual = {
  paper_bgcolor: "var(--paper)", plot_bgcolor: "var(--paper)", font: {color: "var(--ink)", size: 12, family: "system-ui, sans-serif"},
  xaxis: axis, yaxis: axis, margin: {l: 56, r: 16, t: 24, b: 48}, showlegend: false, hovermode: "closest", dragmode: "zoom",
  hoverlabel: {bgcolor: "var(--raised)", bordercolor: "var(--rule)", font: {color: "var(--ink)"}},
  colorway: ["var(--line-0)", "var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)", "var(--line-6)"],
};

function visible(name, spec) {
  const shown = spec.data.map(() => true);
  spec.switches.forEach((one, i) => {
    const box = document.querySelector(`input[data-figure="${name}"][data-switch="${i}"]`);
    if (!box.checked) one.traces.forEach(trace => { shown[trace] = false; });
  });
  if (spec.steps) {
    const at = Number(document.getElementById(`${name}-range`).value);
    const here = new Set(spec.steps[at].traces);
    spec.steps.forEach(step => step.traces.forEach(trace => { if (!here.has(trace)) shown[trace] = false; }));
  }
  return shown;
}

function drawing(name) {
  const spec = page.figures[name], shown = visible(name, spec);
  const style = getComputedStyle(document.documentElement);
  const data = spec.data.map((trace, i) => ({...trace, visible: shown[i]}));
  const layout = {height: 400, ...spec.layout, template: {layout: usual}};
  return coloured({data, layout}, style);
}

function draw(name) {
  const {data, layout} = drawing(name);
  return Plotly.react(`${name}-plot`, data, layout, options);
}

const drawAll = () => Promise.all(Object.keys(page.figures).map(draw));

// As a picture a figure has its title and a legend, which on the page stand beside it.
async function save(name, format) {
  const spec = page.figures[name], {data, layout} = drawing(name);
  const several = spec.switches.length > 1;
  data.forEach(trace => { if (trace.name === undefined) trace.showlegend = false; });
  Object.assign(layout, {width: 1000, height: 560 + (several ? 22 * Math.ceil(spec.switches.length / 3) : 0)});
  Object.assign(layout, {title: {text: spec.title, x: 0.02, font: {size: 16}}, showlegend: several});
  layout.legend = {orientation: "h", yref: "container", y: 0, yanchor: "bottom"};
  layout.margin = {l: 64, r: 24, t: 72, b: 64};
  const url = await Plotly.toImage({data, layout, config: options}, {format, width: layout.width, height: layout.height, scale: format === "png" ? 2 : 1});
  download(url, `${spec.file}.${format}`);
}

function download(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

// A cell that begins as a formula does, and is no number as a whole, is not to be taken for one by a spreadsheet.
const number = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|^[+-]?inf(inity)?$/i;
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "string") return String(value);
  const text = /^[\s\u0000-\u001f]*[=+\-@]/.test(value) && !number.test(value) ? `'${value}` : value;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = table => [table.columns, ...table.rows].map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";

const shown = value => value === null ? "" : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);

function fill(details) {
  const table = page.tables[details.dataset.table];
  if (details.childElementCount > 1) return;
  const region = document.createElement("div"), grid = document.createElement("table");
  region.className = "wide";
  region.tabIndex = 0;
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", details.querySelector("summary").textContent);
  const heads = grid.createTHead().insertRow();
  for (const column of table.columns) {
    const head = document.createElement("th");
    head.scope = "col";
    head.textContent = column;
    heads.append(head);
  }
  const body = grid.createTBody();
  for (const row of table.rows) {
    const line = body.insertRow();
    for (const value of row) {
      const place = line.insertCell();
      place.textContent = shown(value);
      place.className = typeof value === "number" ? "number" : String(value).length > 40 ? "long" : "";
    }
  }
  region.append(grid);
  details.append(region);
  if (table.rows.length < table.of) {
    const words = document.createElement("p");
    words.textContent = `${table.rows.length} of ${table.of} rows, evenly spread`;
    details.append(words);
  }
}

document.addEventListener("change", event => {
  if (event.target.dataset.switch !== undefined) draw(event.target.dataset.figure);
});
document.addEventListener("input", event => {
  const range = event.target;
  if (range.type !== "range" || !range.dataset.figure) return;
  const step = page.figures[range.dataset.figure].steps[Number(range.value)];
  range.setAttribute("aria-valuetext", step.label);
  const output = range.parentElement.querySelector("output"), bold = document.createElement("b");
  bold.textContent = step.label;
  output.replaceChildren(bold, ` ${step.words}`);
  draw(range.dataset.figure);
});
document.addEventListener("click", event => {
  const button = event.target.closest("button[data-save]");
  if (button) save(button.dataset.figure, button.dataset.save);
});
document.addEventListener("toggle", event => { if (event.target.open && event.target.dataset.table) fill(event.target); }, true);
const fillLink = link => { link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(page.tables[link.dataset.csv])); };
document.querySelectorAll("a[data-csv]").forEach(fillLink);

// A change of light to dark draws again; paper is light, and as wide as a page.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("beforeprint", () => {
  document.documentElement.dataset.scheme = "light";
  for (const name of Object.keys(page.figures)) {
    const {data, layout} = drawing(name);
    const small = document.getElementById(name).classList.contains("small");
    Plotly.react(`${name}-plot`, data, {...layout, autosize: false, width: small ? 320 : 660}, {...options, responsive: false});
  }
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.scheme;
  drawAll();
});
drawAll().then(() => { document.documentElement.dataset.drawn = "yes"; });
