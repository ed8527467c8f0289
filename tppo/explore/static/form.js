// The form: which fields stand where, and what they say as a query. Names, help and defaults come from the server.

const PAUSE_MS = 300; // of pasting and typing numbers, before they are sent
export const FIRST = {
  model: "Qwen2.5-7B", gpu: "H100-SXM", gpus: "64", finished_rows: "3000000", windows: "8192",
};
const LABELS = {
  model: "Model", gpu: "GPU", gpus: "GPUs, several with commas", prompts_per_step: "Prompts a step",
  samples_per_prompt: "Responses a prompt", prompt_tokens: "Tokens of a prompt", max_response_tokens: "Longest response",
  mean_tokens: "Mean response", sigma: "Sigma of its log", mean_uncertainty: "Mean, ± share", length_growth_per_step: "Growth a step",
  lengths_column: "Column", windows: "Windows, new tokens a step", factors: "Oversampling factors",
  price_per_hour: "Dollars a GPU-hour", deadline_hours: "Deadline, hours", steps_ratio: "Steps to the same score: low,high",
};
const GROUPS = [
  ["Step", true, [["prompts_per_step", "samples_per_prompt"], ["prompt_tokens", "max_response_tokens"]]],
  ["Money", true, [["price_per_hour", "deadline_hours"]]],
  ["Learning", false, ["steps_ratio"]],
  ["Engine and training", false, ["engine", "tensor_parallel", "expert_parallel", "trainer", "recompute", "value_model",
    "mini_batches", "trainer_share", "weight_sync_s", "switch_s"]],
  ["Rewards", false, [["reward_p50_s", "reward_p90_s"], "reward_workers"]],
  ["Interruptions", false, [["evaluation_every", "evaluation_s"], ["checkpoint_every", "checkpoint_s"],
    ["mtbf_hours", "restart_s"]]],
  ["Answer", false, ["whole_nodes", "draws", "seed", "extrapolate"]],
];
const LAWFUL = ["mean_tokens", "sigma", "mean_uncertainty", "length_growth_per_step"];
const SCHEDULES = {truncated: "truncated", oversample: "oversample", asynchronous: "asynchronous, one step off",
  in_flight: "asynchronous, in flight"};

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const NOTHING = {law: "", file: "Choose a CSV of lengths.", paste: "Paste lengths, one number of tokens each."};

export class Form {
  // changed(): called after every change of an answer's question.
  constructor(root, choices, changed) {
    this.root = root;
    this.choices = choices;
    this.changed = changed;
    this.sent = {};
    // By source of lengths: what the server has of it, and what is missing before there is a question to ask.
    this.uploads = {law: null, file: null, paste: null};
    this.missing = {...NOTHING};
    this.fields = Object.fromEntries(choices.fields.map((field) => [field.name, field]));
    root.append(
      this.folded("Hardware", true, [this.modelField(), this.field("gpu", this.select("gpu", choices.gpus), " "), this.field("gpus")]),
      this.folded("Horizon", true, [this.horizon()]),
      this.group("Response lengths", ...this.lengths()),
      this.schedules(),
      ...GROUPS.map(([title, open, names]) => this.plainGroup(title, open, names)),
    );
    root.addEventListener("submit", (event) => event.preventDefault());
    root.addEventListener("input", (event) => { if (event.target.type !== "file" && event.target.id !== "paste" && event.target.name !== "source") changed(); });
  }

  input(name) { return this.root.querySelector(`[name="${name}"]`); }

  // Open where there is room beside the answer; on a phone the answer comes first to the eye.
  group(title, ...children) { return this.folded(title, matchMedia("(min-width: 60rem)").matches, children); }

  folded(title, open, children) {
    return element("details", {open}, element("summary", {}, title), element("div", {class: "fields"}, ...children));
  }

  plainGroup(title, open, names) {
    const inside = names.map((name) => Array.isArray(name)
      ? element("div", {class: "pair"}, ...name.map((own) => this.field(own))) : this.field(name));
    return open ? this.group(title, ...inside) : this.folded(title, false, inside);
  }

  // A label, an input, its help and its fault.
  field(name, input = null, help = null) {
    const about = this.fields[name];
    const own = input ?? this.plainInput(about);
    own.id = name;
    own.name = name;
    own.setAttribute("aria-describedby", `help-${name} error-${name}`);
    const text = help ?? about.help;
    const label = element("label", {for: name}, LABELS[name] ?? name.replaceAll("_", " "));
    const below = [
      element("span", {class: "help", id: `help-${name}`}, LABELS[name] && input === null && !help ? "" : text),
      element("span", {class: "error", id: `error-${name}`}),
    ];
    if (own.type === "checkbox") {
      return element("div", {class: "field"}, element("span", {class: "check"}, own, label), ...below);
    }
    return element("div", {class: "field"}, label, own, ...below);
  }

  plainInput(about) {
    if (about.flag) return element("input", {type: "checkbox", checked: about.default === true});
    if (about.choices) return this.select(about.name, about.choices, about.default);
    return element("input", {
      type: "text", inputmode: "decimal", placeholder: about.default ?? "", spellcheck: "false", title: about.help,
    });
  }

  select(name, values, chosen = null) {
    return element("select", {}, ...values.map((value) => element("option", {value, selected: value === chosen}, value)));
  }

  modelField() {
    const file = element("input", {type: "file", id: "model-file", accept: ".json,application/json",
      "aria-label": "config.json of another model", onchange: () => this.upload("model", file)});
    const field = this.field("model", this.select("model", this.choices.models), "or the config.json of another:");
    field.insertBefore(file, field.querySelector(".error"));
    return field;
  }

  horizon() {
    const which = element("select", {id: "horizon", "aria-label": "Horizon", onchange: () => this.changed()},
      element("option", {value: "finished_rows"}, "responses"), element("option", {value: "steps"}, "steps"));
    const amount = element("input", {type: "text", inputmode: "numeric", id: "amount", "aria-label": "How many",
      "aria-describedby": "error-steps error-finished_rows"});
    return element("div", {class: "field"}, element("div", {class: "pair amount"}, amount, which),
      element("span", {class: "help"}, "Responses that have to finish, or training steps."),
      element("span", {class: "error", id: "error-steps"}), element("span", {class: "error", id: "error-finished_rows"}));
  }

  lengths() {
    const source = (value, text) => element("label", {class: "check"},
      element("input", {type: "radio", name: "source", value, checked: value === "law",
        onchange: () => { this.showSource(); this.changed(); }}), text);
    const file = element("input", {type: "file", id: "lengths-file", accept: ".csv,text/csv",
      "aria-label": "CSV of response lengths", onchange: () => this.upload("lengths", file)});
    let pause = 0;
    const paste = element("textarea", {id: "paste", "aria-label": "Response lengths, one number each", spellcheck: "false",
      placeholder: "3120 8044 512 24576 ...", oninput: () => {
        this.keep("paste", null, paste.value.trim() ? "Reading the lengths." : NOTHING.paste);
        this.changed();
        clearTimeout(pause);
        pause = setTimeout(() => this.upload("lengths", paste), PAUSE_MS);
      }});
    this.kept = element("span", {class: "help", id: "kept"});
    return [
      element("div", {role: "radiogroup", "aria-label": "Response lengths"}, source("law", "a lognormal law"),
        source("file", "a CSV of a pilot's lengths"), source("paste", "pasted numbers")),
      element("div", {class: "field", id: "of-law"}, element("div", {class: "pair"}, this.field("mean_tokens"), this.field("sigma")),
        element("div", {class: "pair"}, this.field("mean_uncertainty"), this.field("length_growth_per_step"))),
      element("div", {class: "field", id: "of-file", hidden: true}, file,
        this.field("lengths_column", element("select", {}, element("option", {value: "tokens"}, "tokens")), "")),
      element("div", {class: "field", id: "of-paste", hidden: true}, paste),
      this.kept, element("span", {class: "error", id: "error-lengths"}),
      element("input", {type: "hidden", name: "lengths"}),
    ];
  }

  schedules() {
    const boxes = Object.entries(SCHEDULES).map(([value, text]) => element("label", {class: "check"},
      element("input", {type: "checkbox", value, "data-schedule": true}), text));
    return this.group("Schedules", element("span", {class: "help"}, "The synchronous one is always there to compare with."), element("div", {}, ...boxes),
      element("span", {class: "error", id: "error-schedules"}), this.field("windows"), this.field("factors"));
  }

  get source() { return this.root.querySelector('[name="source"]:checked').value; }

  // Why there is no question to ask yet.
  get lacks() { return this.missing[this.source]; }

  showSource() {
    for (const name of ["law", "file", "paste"]) document.getElementById(`of-${name}`).hidden = this.source !== name;
    const own = this.uploads[this.source];
    this.input("lengths").value = own?.id ?? "";
    this.kept.textContent = own ? `Uploaded: ${own.name}` : "";
    document.getElementById("error-lengths").textContent = "";
  }

  // What the server has of a source, or why it has nothing.
  keep(source, own, missing = "") {
    this.uploads[source] = own;
    this.missing[source] = missing;
    if (source === "file" && own) {
      const columns = own.columns.length ? own.columns : ["tokens"];
      this.input("lengths_column").replaceChildren(...columns.map((value) => element("option", {value}, value)));
      this.input("lengths_column").value = columns.includes("tokens") ? "tokens" : columns[0];
    }
    this.showSource();
  }

  async upload(kind, input) {
    const pasted = input.id === "paste", source = pasted ? "paste" : "file";
    if (pasted ? !input.value.trim() : !input.files.length) return;
    const [name, body] = pasted ? ["pasted.csv", input.value] : [input.files[0].name, input.files[0]];
    const place = document.getElementById(`error-${kind}`), sent = this.sent[kind] = {};
    place.textContent = "";
    input.removeAttribute("aria-invalid");
    if (kind === "lengths") this.keep(source, null, "Reading the lengths.");
    this.changed();
    const answer = await fetch(`/api/${kind}?${new URLSearchParams({name, paste: pasted})}`, {method: "POST", body})
      .catch(() => null);
    const told = answer ? await answer.json() : {faults: [{message: "The server does not answer; is tppo explore still running?"}]};
    if (sent !== this.sent[kind]) return; // another one has been sent since
    if (!answer?.ok) {
      if (kind === "lengths") this.keep(source, null, "These lengths cannot be used.");
      place.textContent = told.faults[0].message;
      input.setAttribute("aria-invalid", "true");
    } else if (kind === "lengths") this.keep(source, told);
    else this.offer("model", told.id, `${told.name}, ${(told.parameters / 1e9).toPrecision(3)} billion parameters`);
    this.changed();
  }

  offer(name, value, text) {
    const select = this.input(name);
    if (![...select.options].some((option) => option.value === value)) select.append(element("option", {value}, text));
    select.value = value;
  }

  // What is said of the question: only what differs from a default, as in a command line.
  query() {
    const query = new URLSearchParams();
    const say = (name, value) => { if (value !== "" && value !== null) query.set(name, value); };
    const law = this.source === "law";
    for (const name of ["model", "gpu", "gpus"]) say(name, this.input(name).value.trim());
    say(document.getElementById("horizon").value, document.getElementById("amount").value.trim());
    const checked = [...this.root.querySelectorAll("[data-schedule]:checked")].map((box) => box.value);
    const schedules = ["synchronous", ...checked].join(",");
    if (schedules !== this.fields.schedules.default) query.set("schedules", schedules);
    if (!law) {
      say("lengths", this.input("lengths").value);
      if (this.source === "file" && this.input("lengths_column").value !== "tokens") say("lengths_column", this.input("lengths_column").value);
    }
    for (const field of this.choices.fields) {
      const input = this.input(field.name);
      if (!input || query.has(field.name) || ["schedules", "lengths", "lengths_column", "steps", "finished_rows"].includes(field.name)) continue;
      if (!law && LAWFUL.includes(field.name)) continue;
      if (input.type === "checkbox") { if (input.checked !== field.default) query.set(field.name, input.checked); }
      else if (input.value.trim() !== String(field.default ?? "")) say(field.name, input.value.trim());
    }
    return query;
  }

  restore(query) {
    const given = [...query.keys()].length ? Object.fromEntries(query) : FIRST;
    const schedules = (given.schedules ?? this.fields.schedules.default).split(",");
    for (const box of this.root.querySelectorAll("[data-schedule]")) box.checked = schedules.includes(box.value);
    const horizon = "steps" in given ? "steps" : "finished_rows";
    document.getElementById("horizon").value = horizon;
    document.getElementById("amount").value = given[horizon] ?? "";
    for (const [name, value] of Object.entries({model: FIRST.model, gpu: FIRST.gpu, ...given})) {
      const input = this.input(name);
      if (!input || ["schedules", "lengths", "steps", "finished_rows"].includes(name)) continue;
      if (input.type === "checkbox") input.checked = value === "true";
      else if (input.tagName === "SELECT") this.offer(name, value, value.startsWith("upload-") ? "uploaded config.json" : value);
      else input.value = value;
      if (given !== FIRST) input.closest("details")?.setAttribute("open", "");
    }
    if (given.lengths) {
      this.root.querySelector('[name="source"][value="file"]').checked = true;
      this.keep("file", {id: given.lengths, name: "lengths (an earlier upload)", columns: [given.lengths_column ?? "tokens"]});
    }
  }

  // Faults beside their fields; returns those that belong to none.
  tell(faults) {
    for (const place of this.root.querySelectorAll(".error")) place.textContent = "";
    for (const input of this.root.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    const left = [];
    for (const fault of faults) {
      const place = document.getElementById(`error-${fault.field}`);
      if (!place) { left.push(fault); continue; }
      place.textContent = fault.message;
      place.closest("details")?.setAttribute("open", "");
      const input = this.input(fault.field) ?? document.getElementById("amount");
      input.setAttribute("aria-invalid", "true");
    }
    return left;
  }
}
