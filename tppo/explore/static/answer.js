// The numbers: headline, table, reasons. Intervals are P10 to P90.

import {element} from "./form.js";

export function short(value) {
  if (value === null || value === undefined) return "not known";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}
const percent = (value) => `${(100 * value).toFixed(0)} %`;

function interval(values, scale = 1, unit = "") {
  if (!values) return {middle: "not known", range: ""};
  const [low, middle, high] = ["p10", "p50", "p90"].map((name) => scale * values[name]);
  const wide = high - low >= 1e-9 * Math.max(Math.abs(high), 1e-12);
  return {middle: `${unit}${short(middle)}`, range: wide ? `${unit}${short(low)} to ${unit}${short(high)}` : ""};
}

export function showAnswer(found, shown, most, choose) {
  const able = found.rows.filter((row) => !row.fault);
  const best = able.reduce((a, b) => (b.probability_cheapest > a.probability_cheapest ? b : a));
  document.getElementById("headline").replaceChildren(headline(best));
  document.getElementById("table").replaceChildren(table(found.rows, best, shown, most, choose));
  document.getElementById("words").replaceChildren(words(found, able));
}

function headline(best) {
  const late = best.meets_deadline === false;
  const title = element("h2", {}, late ? "Nothing meets the deadline; closest in kind: " : "Most likely the cheapest: ",
    element("strong", {}, `${best.schedule} on ${best.gpus} GPUs`), best.simulated_only ? tag("simulated only") : null);
  const number = (name, {middle, range}, below = "") => [element("dt", {}, name),
    element("dd", {}, middle, element("small", {}, [range, below].filter(Boolean).join("; ") || " "))];
  const list = element("dl", {class: "numbers"});
  const entries = [
    number("hours", interval(best.hours)), number("US dollars", interval(best.dollars, 1, "$")),
    best.kwh && best.kwh.p50 < 1000 ? number("energy, kWh", interval(best.kwh)) : number("energy, MWh", interval(best.kwh, 1e-3)),
    number("GPUs idle", {middle: percent(best.idle_share), range: best.first_idle_cause?.replaceAll("_", " ") ?? ""}),
    number("speed-up", {middle: best.speedup_per_finished_row === null ? "not known" : `${short(best.speedup_per_finished_row)}×`,
      range: best.schedule === "synchronous" ? "it is the synchronous run" : "per response, over the synchronous run"}),
  ];
  for (const entry of entries) list.append(element("div", {}, ...entry));
  return element("div", {class: "card"}, title, list);
}

const tag = (text) => element("span", {class: "tag"}, text);

function table(rows, best, shown, most, choose) {
  const head = ["draw", "GPUs", "schedule", "hours", "dollars", "MWh", "idle", "x step", "x response", "x score", "cheapest", "TP", "headroom"];
  const body = rows.map((row, place) => row.fault ? null : line(row, place, row === best, shown, most, choose)).filter(Boolean);
  const note = element("p", {class: "note", id: "note"}, "P50, and P10–P90 below it. x: times as fast as the synchronous run on the "
    + "same GPUs, per step and per finished response. Front: no other option is both faster and cheaper.");
  const all = element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "All options"},
    element("table", {"aria-describedby": "note"}, element("thead", {}, element("tr", {}, ...head.map((name) => element("th", {scope: "col", class: name === "schedule" ? "left" : null}, name)))),
    element("tbody", {}, ...body)));
  return element("div", {class: "card"}, all, note, ...cannotRun(rows));
}

// One line a reason: often the same for every schedule on so many GPUs.
function cannotRun(rows) {
  const reasons = new Map();
  for (const row of rows.filter((own) => own.fault)) {
    const key = `${row.gpus} GPUs cannot run: ${row.fault}`;
    reasons.set(key, [...(reasons.get(key) ?? []), row.schedule]);
  }
  return [...reasons].map(([reason, schedules]) => element("p", {class: "fault"}, `${schedules.join(", ")} on ${reason}.`));
}

function line(row, place, isBest, shown, most, choose) {
  const name = `${row.schedule} on ${row.gpus} GPUs`;
  const box = element("input", {type: "checkbox", "aria-label": `draw ${name}`, checked: shown.includes(place),
    onchange: () => {
      const left = shown.filter((own) => own !== place);
      const wanted = box.checked ? [...left, place].slice(-most) : left;
      if (wanted.length) choose(wanted.toSorted((a, b) => a - b));
      else box.checked = true;
    }});
  const cell = (text, range = "") => element("td", {}, text, range ? element("small", {}, range) : null);
  const spread = (values, scale) => { const {middle, range} = interval(values, scale); return cell(middle, range.replace(" to ", "–")); };
  const first = [element("td", {}, box), cell(row.gpus), element("td", {class: "left"}, row.schedule, element("small", {},
    row.on_the_front ? tag("front") : null, row.simulated_only ? tag("simulated only") : null))];
  return element("tr", {class: isBest ? "best" : null, "data-place": place}, ...first,
    spread(row.hours), spread(row.dollars), spread(row.kwh, 1e-3), cell(percent(row.idle_share)), cell(short(row.speedup_per_step)),
    cell(short(row.speedup_per_finished_row)), spread(row.speedup_at_equal_score), cell(percent(row.probability_cheapest)),
    cell(row.tensor_parallel), cell(`${short(row.memory_headroom_gb)} GB`));
}

function words(found, able) {
  const why = able.filter((row) => row.on_the_front || row.probability_cheapest > 0.05);
  // The command's words name its flags; here they are fields.
  const plain = (text) => text.replace(/--([a-z][a-z-]*)/g, (flag, name) => `"${name.replaceAll("-", " ")}"`);
  const list = (items) => element("ul", {}, ...items.map((text) => element("li", {}, plain(text))));
  const entries = [
    ["What decides", found.decides], ["Best window", found.best_window], ["Tail", found.tail],
    ["Why", list(why.map((row) => `${row.schedule} on ${row.gpus} GPUs: ${row.why}`))],
    ["Assumed, the most decisive first", list(found.assumptions)],
  ].filter(([, text]) => text);
  return element("div", {class: "card"}, element("dl", {}, ...entries.map(([name, text]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, text)))));
}
