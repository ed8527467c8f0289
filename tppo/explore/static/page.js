// Form to question to answer to pictures. A new question gives up the one before it.

import {element, Form} from "./form.js";
import {showAnswer} from "./answer.js";
import {showPictures} from "./pictures.js";

const PICTURES = {firstPictures: "/api/first/pictures", pictures: "/api/pictures"};
const PAUSE_MS = 120; // of typing, before a question is asked
const at = (id) => document.getElementById(id);
let form, choices, found = null, shown = [], asking = new AbortController(), pause = 0, clock = 0;

// What is on its way answers a question that is no longer asked; what is shown does, too.
function giveUp() {
  asking.abort();
  for (const what of ["first", "firstPictures", "numbers", "pictures"]) delete document.body.dataset[what];
}

// "": the answer to the question; "first": a first estimate; "stale": of another question.
function look(state) {
  for (const name of ["first", "stale"]) at("answer").classList.toggle(name, name === state);
  at("actions").inert = state !== "";
}

async function ask() {
  giveUp();
  asking = new AbortController();
  if (form.lacks) {
    rest();
    look("stale");
    at("status").textContent = form.lacks;
    return;
  }
  const own = asking, query = form.query(), began = performance.now();
  shown = chosenFromAddress();
  remember(query);
  busy(began);
  try {
    // Where the first estimate is refused, so is the answer, which tells why.
    const first = await get(`/api/first?${query}`, own.signal).catch(() => null);
    if (own !== asking) return;
    if (first && !first.whole) {
      show(first.answer);
      document.body.dataset.first = query;
      look("first");
      busy(began);
      await draw("firstPictures", own.signal).catch(() => null);
      if (own !== asking) return;
    }
    const answer = first?.whole ? first.answer : await get(`/api/answer?${query}`, own.signal);
    if (own !== asking) return;
    show(answer);
    rest();
    look("");
    at("status").textContent = `Simulated in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
    document.body.dataset.numbers = query;
    await draw("pictures", own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    rest();
    complain(error);
  }
}

function show(answer) {
  found = answer;
  shown = shown.filter((place) => place < found.rows.length && !found.rows[place].fault);
  if (!shown.length) shown = firstChoice(found.rows);
  form.tell([]);
  at("faults").replaceChildren();
  showAnswer(found, shown, choices.most_shown, choose);
  at("actions").hidden = false;
}

async function draw(which, signal) {
  const query = form.query();
  query.set("shown", shown.join(","));
  showPictures(await get(`${PICTURES[which]}?${query}`, signal), choices.causes);
  document.body.dataset[which] = query;
}

function choose(places) {
  shown = places;
  const query = form.query();
  query.set("shown", shown.join(","));
  remember(query);
  showAnswer(found, shown, choices.most_shown, choose);
  if (document.body.dataset.numbers === undefined) return; // the answer on its way brings the pictures
  draw("pictures", asking.signal).catch((error) => { if (!asking.signal.aborted) complain(error); });
}

// The synchronous option and the one that is likeliest the cheapest, on the same GPUs.
function firstChoice(rows) {
  const able = rows.map((row, place) => ({...row, place})).filter((row) => !row.fault);
  const best = able.reduce((a, b) => (b.probability_cheapest > a.probability_cheapest ? b : a));
  const plain = able.find((row) => row.schedule === "synchronous" && row.gpus === best.gpus);
  const other = plain === best || !plain ? able.filter((row) => row.gpus === best.gpus).slice(0, 2) : [plain, best];
  return [...new Set(other.map((row) => row.place))];
}

function chosenFromAddress() {
  const text = new URLSearchParams(location.search).get("shown") ?? "";
  return text.split(",").filter((part) => /^\d+$/.test(part)).map(Number);
}

function remember(query) {
  const address = new URLSearchParams(query);
  if (shown.length && !address.has("shown")) address.set("shown", shown.join(","));
  history.replaceState(null, "", `/?${address}`);
}

async function get(address, signal) {
  const answer = await fetch(address, {signal}).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw {faults: [{field: null, message: "The server does not answer; is tppo explore still running?"}]};
  });
  if (answer.ok) return answer.headers.get("content-type") === "application/json" && !address.includes("/api/report") ? answer.json() : answer;
  throw await answer.json().catch(() => ({faults: [{field: null, message: `The server answers ${answer.status}`}]}));
}

function complain(error) {
  if (!error.faults) throw error;
  const left = form.tell(error.faults);
  at("faults").replaceChildren(...left.map((fault) => element("p", {class: "fault"}, fault.message)));
  look("stale");
  at("status").textContent = left.length ? "" : "One of the fields cannot be used as it is.";
}

function busy(began) {
  rest();
  at("answer").setAttribute("aria-busy", true);
  const say = () => {
    const waited = (performance.now() - began) / 1000, seconds = waited < 2 ? "" : `, ${waited.toFixed(0)} s`;
    const first = document.body.dataset.first !== undefined;
    if (!first && waited > 0.4) look("stale");
    at("status").textContent = first ? `First estimate, from a part of the cluster; refining${seconds}` : `Simulating${seconds}`;
  };
  say();
  clock = setInterval(say, 100);
}

function rest() {
  clearInterval(clock);
  at("answer").setAttribute("aria-busy", false);
}

async function save(button, address, name) {
  button.disabled = true;
  at("done").textContent = "Making it";
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw await answer.json();
    const given = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition") ?? "");
    const link = element("a", {href: URL.createObjectURL(await answer.blob()), download: given ? given[1] : name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    at("done").textContent = "Saved.";
  } catch (error) {
    at("done").textContent = error.faults ? error.faults[0].message : "The server does not answer.";
  }
  button.disabled = false;
}

function wireActions() {
  at("save-answer").onclick = (event) => save(event.target, `/api/answer?${form.query()}`, "answer.json");
  at("save-experiment").onclick = (event) => {
    const query = form.query();
    query.set("place", shown.at(-1));
    save(event.target, `/api/experiment?${query}`, "experiment.toml");
  };
  at("save-report").onclick = (event) => {
    const query = form.query();
    query.set("shown", shown.join(","));
    save(event.target, `/api/report?${query}`, "report.html");
  };
  at("share").onclick = async () => {
    const uploaded = /upload-/.test(location.search);
    const note = uploaded ? " What was uploaded is not in it: it opens as long as this server runs." : "";
    try {
      await navigator.clipboard.writeText(location.href);
      at("done").textContent = `Copied.${note}`;
    } catch {
      at("done").textContent = `${location.href}${note}`;
    }
  };
}

choices = await get("/api/choices");
form = new Form(at("question"), choices, () => {
  giveUp();
  clearTimeout(pause);
  pause = setTimeout(ask, PAUSE_MS);
});
form.restore(new URLSearchParams([...new URLSearchParams(location.search)].filter(([name]) => name !== "shown")));
wireActions();
ask();
