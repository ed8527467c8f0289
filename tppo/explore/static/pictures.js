// Three pictures of the chosen options, drawn from the numbers of their simulations.

import {element} from "./form.js";
import {short} from "./answer.js";

const SPACE = "http://www.w3.org/2000/svg";
const COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"];
const NAMES = {decode: "decode", prefill: "prefill"};
let last = null;

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const text = (x, y, words, more = {}) => svg("text", {x, y, ...more}, words);
const named = (option) => `${option.schedule}, ${option.gpus} GPUs`;

export function showPictures(options, causes) {
  last = [options, causes];
  const able = options.filter((option) => option.gpu_seconds);
  const root = document.getElementById("pictures");
  if (!able.length) { root.replaceChildren(); return; }
  const width = Math.max(260, document.getElementById("answer").clientWidth - 44);
  root.replaceChildren(ledger(able, causes, width), timeline(able, causes, width), roofline(able, width));
}
let pause = 0;
addEventListener("resize", () => { clearTimeout(pause); pause = setTimeout(() => last && showPictures(...last), 150); });

function card(title, picture, label, caption, legend) {
  if (picture) { picture.setAttribute("role", "img"); picture.setAttribute("aria-label", label); }
  return element("figure", {class: "card"}, element("h2", {}, title), picture, legend, element("figcaption", {}, caption));
}

function legendOf(entries) {
  return element("ul", {class: "legend"}, ...entries.map(([colour, name, shape]) => {
    const mark = shape === "circle" ? svg("circle", {cx: 6, cy: 6, r: 5, fill: colour})
      : shape === "square" ? svg("rect", {x: 1.5, y: 1.5, width: 9, height: 9, fill: colour, stroke: colour}) : svg("rect", {width: 12, height: 12, rx: 2, ...(colour ? {fill: colour} : {class: "idle"})});
    return element("li", {}, svg("svg", {viewBox: "0 0 12 12", "aria-hidden": "true"}, mark), name);
  }));
}

function ledger(options, causes, width) {
  const rows = 46, height = rows * options.length + 22;
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`});
  const seen = new Set(), told = [];
  options.forEach((option, place) => {
    const total = Object.values(option.gpu_seconds).reduce((a, b) => a + b, 0);
    picture.append(text(0, place * rows + 13, named(option)));
    let x = 0;
    const shares = [];
    for (const cause of Object.keys(causes)) {
      const share = (option.gpu_seconds[cause] ?? 0) / total;
      if (share < 5e-4) continue;
      seen.add(cause);
      shares.push(`${causes[cause].label} ${(100 * share).toFixed(1)} %`);
      picture.append(svg("rect", {x: x * width, y: place * rows + 19, width: share * width, height: 20, fill: causes[cause].colour},
        svg("title", {}, shares.at(-1))));
      x += share;
    }
    told.push(`${named(option)}: ${shares.join(", ")}`);
  });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(text(Math.min(Math.max(share * width, 0), width), height - 3, `${100 * share} %`,
      {class: "quiet", "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle"}));
  }
  return card("Where GPU time goes", picture, told.join(". "),
    "Simulated. GPU-seconds of a step by cause; every one has exactly one name. A decode step costs almost the same half full, so its empty slots cannot simply be won back.",
    legendOf([...seen].map((cause) => [causes[cause].colour, causes[cause].label])));
}

// Filled columns, one a piece, from `base` upwards, as one path.
function columns(from, share, x0, wide, top, high) {
  let path = "";
  share.forEach((value, place) => {
    if (value < 0.002) return;
    const y = top + high * (1 - from[place] - value);
    path += `M${(x0 + place * wide).toFixed(1)} ${y.toFixed(1)}h${(wide + 0.15).toFixed(2)}v${(high * value).toFixed(1)}h${(-wide - 0.15).toFixed(2)}z`;
  });
  return path;
}

function timeline(options, causes, width) {
  const label = 78, lane = 20, gap = 4, inner = width - label;
  const longest = Math.max(...options.map((option) => option.timeline.seconds));
  const scale = (seconds) => (inner * seconds) / longest;
  const picture = svg("svg", {});
  const seen = new Set(["decode_useful", "decode_underfilled"]), told = [];
  let y = 0;
  for (const option of options) {
    const {timeline: own} = option, trainer = own.beside ? 1 : 0;
    const some = width > 420 && own.lanes.length < own.engines ? `, ${own.lanes.length} of ${own.engines} engines` : "";
    picture.append(text(0, y + 13, `${named(option)}: ${short(own.seconds)} s${some}`));
    y += 20;
    for (const row of own.lanes) {
      picture.append(text(label - 8, y + 14, `engine ${row.engine}`, {class: "quiet", "text-anchor": "end"}),
        svg("rect", {x: label, y, width: scale(own.seconds), height: lane, class: "idle"}));
      const wide = scale(own.seconds) / row.decode.length, none = row.decode.map(() => 0);
      const empty = row.decode.map((value, at) => Math.max(0, value - row.filled[at]));
      for (const [from, share, cause] of [[none, row.filled, "decode_useful"], [row.filled, empty, "decode_underfilled"],
        [row.decode, row.prefill, "prefill"]]) {
        picture.append(svg("path", {d: columns(from, share, label, wide, y, lane), fill: causes[cause].colour}));
        if (cause === "prefill" && share.some((value) => value > 0.002)) seen.add(cause);
      }
      for (const phase of own.phases.filter((one) => one.everywhere)) picture.append(phaseMark(phase, y));
      y += lane + gap;
    }
    if (trainer) {
      picture.append(text(label - 8, y + 14, "trainer", {class: "quiet", "text-anchor": "end"}),
        svg("rect", {x: label, y, width: scale(own.seconds), height: lane, class: "idle"}));
      for (const phase of own.phases) picture.append(phaseMark(phase, y));
      y += lane + gap;
    }
    for (const phase of own.phases) seen.add(phase.name);
    const training = own.phases.reduce((sum, phase) => sum + phase.end - phase.start, 0);
    told.push(`${named(option)}: a step of ${short(own.seconds)} seconds, of which phases other than the rollout take ${short(training)}`);
    y += 12;
  }
  function phaseMark(phase, top) {
    const known = causes[phase.name];
    return svg("rect", {x: label + scale(phase.start), y: top, width: Math.max(scale(phase.end - phase.start), 0.5), height: lane,
      fill: known?.colour ?? "#9a9a9a"}, svg("title", {}, `${known?.label ?? phase.name}: ${short(phase.end - phase.start)} s`));
  }
  const round = niceStep(longest / Math.max(2, Math.floor(inner / 90)));
  for (let t = 0; t <= longest; t += round) {
    const x = label + scale(t);
    picture.append(svg("line", {x1: x, x2: x, y1: y - 8, y2: y - 3, class: "axis"}),
      text(x, y + 10, t === 0 ? "0 s" : short(t), {class: "quiet", "text-anchor": t === 0 ? "start" : x > width - 20 ? "end" : "middle"}));
  }
  picture.setAttribute("viewBox", `0 0 ${width} ${y + 14}`);
  const entries = Object.keys(causes).filter((cause) => seen.has(cause)).map((cause) => [causes[cause].colour, causes[cause].label]);
  return card("A step", picture, told.join(". "),
    "Simulated. One step after start-up, from the beginning of its rollout to the next one's; from the engine that is done first to the one that is done last.",
    legendOf([...entries, [null, "waiting"]]));
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
}

function roofline(options, width) {
  const missing = options.find((option) => option.roofline.missing);
  if (missing) return card("Roofline", null, "", `Not drawn: ${missing.roofline.missing}.`, null);
  const {hardware} = options[0].roofline;
  const points = options.flatMap((option, place) => option.roofline.points.map((point) => ({...point, place, option})));
  const height = Math.min(340, Math.max(240, width * 0.5)), left = 52, bottom = 42, top = 26;
  const ridge = hardware.peak_flops / hardware.memory_bytes_per_s;
  const xs = [Math.min(ridge, ...points.map((point) => point.intensity)) / 4, Math.max(ridge, ...points.map((point) => point.intensity)) * 4];
  const ys = [Math.min(hardware.memory_bytes_per_s * xs[0], ...points.map((point) => point.flops_per_s)) / 2, hardware.peak_flops * 2.5];
  const along = (value, [low, high], from, to) => from + ((to - from) * Math.log(value / low)) / Math.log(high / low);
  const x = (value) => along(value, xs, left, width - 8), y = (value) => along(value, ys, height - bottom, top);
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`});
  for (let power = Math.ceil(Math.log10(xs[0])); 10 ** power <= xs[1]; power += width < 420 ? 2 : 1) {
    picture.append(svg("line", {x1: x(10 ** power), x2: x(10 ** power), y1: top, y2: height - bottom, class: "axis"}),
      text(x(10 ** power), height - bottom + 15, (10 ** power).toLocaleString("en-US"), {class: "quiet", "text-anchor": "middle"}));
  }
  for (let power = Math.ceil(Math.log10(ys[0])); 10 ** power <= ys[1]; power += 1) {
    const tera = 10 ** (power - 12);
    picture.append(svg("line", {x1: left, x2: width - 8, y1: y(10 ** power), y2: y(10 ** power), class: "axis"}),
      text(left - 6, y(10 ** power) + 4, String(Number(tera.toPrecision(3))), {class: "quiet", "text-anchor": "end"}));
  }
  picture.append(text(0, 12, "TFLOP/s of one GPU", {class: "quiet"}),
    text(width - 8, height - 6, "FLOP per byte of memory traffic", {class: "quiet", "text-anchor": "end"}));
  const roof = (peak, bandwidth, dash) => picture.append(svg("path", {class: "line", "stroke-width": 1.6, "stroke-dasharray": dash,
    d: `M${x(xs[0])} ${y(Math.min(peak, xs[0] * bandwidth))}L${x(peak / bandwidth)} ${y(peak)}L${x(xs[1])} ${y(peak)}`}));
  roof(hardware.peak_flops, hardware.memory_bytes_per_s, "none");
  if (hardware.empirical_flops) roof(hardware.empirical_flops, hardware.empirical_memory_bytes_per_s, "5 4");
  picture.append(text(width - 10, y(hardware.peak_flops) - 6, `${short(hardware.peak_flops / 1e12)} TFLOP/s`, {"text-anchor": "end"}),
    text(x(ridge / 5) - 8, y(hardware.peak_flops / 5) - 4, `${short(hardware.memory_bytes_per_s / 1e12)} TB/s`, {"text-anchor": "end"}));
  picture.append(svg("line", {x1: x(ridge), x2: x(ridge), y1: y(hardware.peak_flops), y2: height - bottom, class: "line", "stroke-dasharray": "1 3"}),
    text(x(ridge) + 6, height - bottom - 6, `ridge: ${short(ridge)} FLOP per byte`, {class: "quiet"}));
  for (const point of points) {
    const where = {fill: COLOURS[point.place % COLOURS.length], "fill-opacity": 0.75, stroke: "var(--card)"};
    const mark = point.work === "decode" ? svg("circle", {cx: x(point.intensity), cy: y(point.flops_per_s), r: 7, ...where})
      : svg("rect", {x: x(point.intensity) - 6, y: y(point.flops_per_s) - 6, width: 12, height: 12, ...where});
    mark.append(svg("title", {}, told(point)));
    picture.append(mark);
  }
  function told(point) {
    return `${named(point.option)}, ${NAMES[point.work] ?? point.work}: ${short(point.flops_per_s / 1e12)} TFLOP/s at ${short(point.intensity)} FLOP per byte`;
  }
  const entries = options.map((option, place) => [COLOURS[place % COLOURS.length], named(option)]);
  return card("Roofline of the rollout", picture, points.map(told).join(". "),
    `Simulated. ${hardware.name}: solid: the data sheet; dashed: ${hardware.empirical_from}. Round: decode, square: prefill. A simulated point follows from the cost model; it is not evidence about the GPU.`,
    legendOf(entries));
}
