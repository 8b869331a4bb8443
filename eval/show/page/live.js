"use strict";
// Asks the server for what is new, once a second, and draws it.
const live = {era: null, number: 0, events: [], points: [], busy: false};
const MOST = 4000; // points drawn, at most
const BEYOND = "not finite"; // a value that has no place on an axis: its mark is drawn at the top

function forget() {
  Object.assign(live, {number: 0, events: [], points: []});
}

const size = point => point[1][0] === BEYOND ? Infinity : point[1][0];

// Of four older points the lowest and the highest stay, so that a page that is left open does not grow.
function thin() {
  while (live.points.length > MOST) {
    const kept = [], half = MOST / 2;
    for (let i = 0; i < half; i += 4) {
      const four = live.points.slice(i, i + 4).sort((a, b) => size(a) - size(b));
      kept.push(...[four[0], four[four.length - 1]].sort((a, b) => a[0] - b[0]));
    }
    live.points = kept.concat(live.points.slice(half));
  }
}

function take(news) {
  if (news.era !== live.era) forget();
  live.era = news.era;
  live.number = news.number;
  live.points.push(...news.points);
  thin();
  live.events = news.events.map(event => event[1]).reverse();
  return news.points.length > 0 || news.fresh;
}

function write(news) {
  const list = document.querySelector(".verdict ul") || document.querySelector(".verdict");
  const tag = list.tagName === "UL" ? "li" : "p";
  list.querySelectorAll(tag).forEach(line => line.remove());
  news.verdict.forEach(words => list.append(Object.assign(document.createElement(tag), {textContent: words})));
  document.querySelectorAll("dl dt").forEach(name => {
    if (name.textContent === "rows") name.nextElementSibling.textContent = news.count.toLocaleString("en");
  });
  say(news.status);
  const body = document.querySelector(".table tbody");
  if (!body) return;
  body.replaceChildren(...live.events.map(cells => {
    const row = document.createElement("tr");
    row.append(...cells.map(text => Object.assign(document.createElement("td"), {textContent: text})));
    return row;
  }));
  const table = page.tables[document.querySelector(".table a[data-csv]").dataset.csv];
  Object.assign(table, {rows: live.events, of: live.events.length});
}

function say(words) {
  const place = document.getElementById("status");
  if (place.textContent !== words) place.textContent = words; // it is read aloud where it changes, and only there
}

function show(news) {
  for (const [name, spec] of Object.entries(page.figures)) {
    const places = spec.data.map(trace => trace.meta);
    const numbers = live.points.flatMap(point => places.map(place => point[1][place])).filter(Number.isFinite);
    const top = 2 * numbers.reduce((most, value) => Math.max(most, value), 1);
    spec.data.forEach((trace, i) => {
      const known = live.points.filter(point => point[1][places[i]] !== null);
      trace.x = known.map(point => point[0]);
      const values = known.map(point => point[1][places[i]]);
      trace.y = values.map(value => value !== BEYOND ? value : trace.mode === "markers" ? top : null);
      trace.customdata = values.map(shown);
    });
    const words = spec.data.map((trace, i) => `${trace.name}: ${news.words[places[i]]}`);
    document.getElementById(`${name}-words`).textContent = `${words.join("; ")}.`;
    const holder = document.querySelector(`#${name} details`);
    const table = page.tables[holder.dataset.table];
    table.rows = live.points.map(point => [point[0], ...places.map(place => point[1][place])]);
    table.of = table.rows.length;
    holder.querySelectorAll(".wide, p").forEach(old => old.remove());
    if (holder.open) fill(holder);
    draw(name);
  }
}

async function ask() {
  try {
    const answer = await fetch(`data?era=${live.era ?? -1}&since=${live.number}`, {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.statusText);
    const news = await answer.json();
    if (take(news)) show(news);
    write(news);
  } catch {
    say("The watch has ended, or cannot be reached.");
  }
  setTimeout(ask, 1000);
}

document.addEventListener("click", event => {
  const link = event.target.closest("a[data-csv]");
  if (link) fillLink(link);
}, true);
const status = document.createElement("p");
status.id = "status";
status.setAttribute("role", "status");
document.querySelector("header").append(status);
ask();
