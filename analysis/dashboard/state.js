"use strict";
// The content that analysis.dashboard.content gathered, and which part of it is looked at.
let DATA;
const state = { run: 0, latent: null, rows: [], active: 0, texts: [] };

async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const byId = (id) => document.getElementById(id);
const run = () => DATA.runs[state.run];

// Texts become nodes by textContent alone: whatever stands in a corpus, it is shown and never run.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function percent(share) {
  if (share === 0) return "never";
  return `${(100 * share).toPrecision(share < 0.001 ? 2 : 3)} %`;
}
const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits)));

// A token as it can be seen: its line breaks and, with `spaces`, every space.
function visible(text, spaces = false) {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return spaces ? shown.replaceAll(" ", "␣") : shown.replace(/ {3,}/g, "  ");
}

const promotedTokens = (of, latent) => (of.promoted?.[latent] ?? []).map((i) => DATA.tokens[i]);

// What search looks through of a latent, made when it is first asked for.
function textsOf(of, latent) {
  const known = (state.texts[state.run] ??= []);
  if (!known[latent]) {
    const details = of.details[latent];
    const tokens = details?.effects ? details.effects[0][0].map((i) => DATA.tokens[i]) : promotedTokens(of, latent);
    const contexts = (details?.contexts ?? []).map(([, , ids]) => ids.map((i) => DATA.tokens[i]).join(""));
    known[latent] = { promoted: tokens.join("\n").toLowerCase(), contexts: contexts.join("\u0000").toLowerCase() };
  }
  return known[latent];
}

function isFound(of, latent, query, scope) {
  if (query === "") return true;
  if (scope === "id") return String(latent) === query;
  const texts = textsOf(of, latent);
  if (scope !== "all") return texts[scope].includes(query);
  return String(latent) === query || texts.promoted.includes(query) || texts.contexts.includes(query);
}

const ORDERS = {
  frequent: (of) => (a, b) => of.frequency[b] - of.frequency[a],
  rare: (of) => (a, b) => (of.frequency[a] || 2) - (of.frequency[b] || 2), // latents that never fire come last
  strong: (of) => (a, b) => of.max[b] - of.max[a],
  id: () => (a, b) => a - b,
};

// The latents of the list, as the controls say.
function chooseRows() {
  const of = run();
  const bound = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value) / 100);
  const [low, high] = [bound("low", 0), bound("high", 1)];
  const [query, scope] = [byId("search").value.trim().toLowerCase(), byId("scope").value];
  const rows = [];
  for (let i = 0; i < of.d_sae; i++) {
    if (of.frequency[i] >= low && of.frequency[i] <= high && isFound(of, i, query, scope)) rows.push(i);
  }
  rows.sort(ORDERS[byId("sort").value](of));
  const exact = rows.findIndex((latent) => String(latent) === query);
  if (exact > 0) rows.unshift(...rows.splice(exact, 1));
  return rows;
}
