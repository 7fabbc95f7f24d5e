// The trace browser. Text of models and users enters the page by textContent alone.
(function () {
"use strict";
const ERASED = 1, FORCED = 2, HIDDEN = 4, CATEGORY = 8, RETRACTION = 16, COPY = 32, PAGE = 24;
const data = JSON.parse(document.getElementById("trace-data").textContent);
const form = document.getElementById("trace-filters"), list = document.getElementById("trace-rows");
const count = document.getElementById("trace-count"), more = document.getElementById("trace-more");
const box = document.getElementById("trace-browser");
const FIELDS = ["stage", "attack", "split", "verdict", "category"];
let found = [], shown = 0;

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

for (const row of data.rows) {
  row.directive = row.directive ? "with" : "without";
  const words = row.text.map(function (piece) { return piece[0]; }).join("");
  row.words = [row.prompt, words, row.reads.map(function (piece) { return piece[0]; }).join(""), row.id, row.why].join("\n").toLowerCase();
}

for (const field of FIELDS) {
  const select = form.elements[field];
  const seen = new Set(data.rows.map(function (row) { return row[field]; }));
  const order = field === "stage" ? data.stages : Array.from(seen);
  for (const value of order) {
    if (!seen.has(value)) continue;
    const option = make("option", "", value === "" ? "(none)" : value);
    option.value = "=" + value;
    select.append(option);
  }
}
form.elements.stage.value = "=" + data.stages[data.stages.length - 1];

function pieces(into, all) {
  let veil = null;
  for (const piece of all) {
    const kind = piece[1];
    const names = [];
    if (kind & ERASED) names.push("erased");
    if (kind & FORCED) names.push("forced");
    if (kind & CATEGORY) names.push("category");
    if (kind & RETRACTION) names.push("retraction");
    if (kind & COPY) names.push("copy");
    const span = make("span", names.join(" "), piece[0]);
    if (!(kind & HIDDEN)) {
      veil = null;
      into.append(span);
      continue;
    }
    if (veil === null) {
      veil = make("span", "veil");
      veil.tabIndex = 0;
      veil.setAttribute("role", "button");
      veil.setAttribute("aria-label", "hidden text; show it");
      veil.title = "click to show";
      into.append(veil);
    }
    veil.append(span);
  }
}

function article(row) {
  const element = make("article", "row"), head = make("div", "head");
  const where = [row.stage, row.attack, row.split === "all" ? "" : row.split, row.category, row.knobs];
  head.append(make("span", "", where.filter(Boolean).join(" · ")), make("span", "badge " + row.tone, row.label));
  const trace = make("p", "trace"), reads = make("p", "reads");
  pieces(trace, row.text);
  pieces(reads, row.reads);
  element.append(head, make("p", "prompt", row.prompt), trace);
  if (row.reads.length) element.append(reads);
  if (row.why) element.append(make("p", "soft", "not judged: " + row.why));
  element.append(make("p", "id", "request " + row.id));
  return element;
}

function grow() {
  const part = document.createDocumentFragment();
  for (const row of found.slice(shown, shown + PAGE)) part.append(article(row));
  list.append(part);
  shown = Math.min(shown + PAGE, found.length);
  more.hidden = shown >= found.length;
  more.textContent = "Show " + Math.min(PAGE, found.length - shown) + " more of " + (found.length - shown).toLocaleString("en");
  count.textContent = found.length === 0 ? "No row matches." :
    found.length.toLocaleString("en") + (found.length === 1 ? " row matches" : " rows match") + ", " + shown.toLocaleString("en") + " shown.";
}

function filter() {
  const wanted = FIELDS.concat("directive").map(function (field) { return [field, form.elements[field].value]; });
  const chosen = wanted.filter(function (pair) { return pair[1] !== ""; });
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  found = data.rows.filter(function (row) {
    return chosen.every(function (pair) { return "=" + row[pair[0]] === pair[1]; }) &&
      words.every(function (word) { return row.words.includes(word); });
  });
  shown = 0;
  list.replaceChildren();
  grow();
}

function toggle(veil) {
  const open = veil.classList.toggle("open");
  if (open) veil.removeAttribute("aria-label");
  else veil.setAttribute("aria-label", "hidden text; show it");
  veil.setAttribute("aria-expanded", String(open));
}

form.addEventListener("input", filter);
form.addEventListener("submit", function (event) { event.preventDefault(); });
form.addEventListener("reset", function () {
  box.classList.remove("reveal");
  setTimeout(filter, 0);
});
form.elements.reveal.addEventListener("input", function (event) {
  event.stopPropagation();
  box.classList.toggle("reveal", event.target.checked);
});
more.addEventListener("click", function () {
  const before = list.children.length;
  grow();
  const first = list.children[before];
  if (first) { first.tabIndex = -1; first.focus({ preventScroll: true }); }
});
list.addEventListener("click", function (event) {
  const veil = event.target.closest(".veil");
  if (veil) toggle(veil);
});
list.addEventListener("keydown", function (event) {
  if ((event.key === "Enter" || event.key === " ") && event.target.classList.contains("veil")) {
    event.preventDefault();
    toggle(event.target);
  }
});
filter();
})();
