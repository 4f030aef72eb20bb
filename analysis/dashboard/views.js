// The list, the overview and the view of a latent.
const ROW = 44; // pixels, as in page.css
const runLetter = (i) => String.fromCharCode(65 + i);
const dot = (label) => html("span", { class: "dot", "--colour": colour(label), "aria-hidden": "true" });

function drawRow(latent, place) {
  const of = run();
  const tokens = promotedTokens(of, latent);
  // A bar of 4 decades: 0.01 % is nothing, 100 % is full.
  const share = of.frequency[latent] ? Math.max(2, 100 + 25 * Math.log10(of.frequency[latent])) : 0;
  const node = html(
    "div",
    {
      class: latent in of.details ? "row" : "row listed-only",
      role: "option",
      id: `row-${latent}`,
      "aria-selected": String(place === state.active),
      "aria-setsize": state.rows.length,
      "aria-posinset": place + 1,
      "data-place": place,
    },
    html("span", { class: "number" }, `#${latent}`),
    html("span", { class: "share number", "--share": `${share}%` }, percent(of.frequency[latent])),
    html("span", { class: "words" }, tokens.map((token) => visible(token, true)).join("  ")),
  );
  node.style.transform = `translateY(${place * ROW}px)`;
  return node;
}

// Only the rows in sight are nodes of the page.
function drawRows() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(state.rows.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  byId("rows").style.height = `${state.rows.length * ROW}px`;
  byId("rows").replaceChildren(...state.rows.slice(first, last).map((latent, i) => drawRow(latent, first + i)));
  if (byId(`row-${state.rows[state.active]}`))
    list.setAttribute("aria-activedescendant", `row-${state.rows[state.active]}`);
  else list.removeAttribute("aria-activedescendant");
}

function showList() {
  const before = state.rows[state.active];
  state.rows = chooseRows();
  state.active = Math.max(0, state.rows.indexOf(state.latent ?? before));
  const listed = state.rows.filter((latent) => latent in run().details).length;
  byId("found").textContent =
    `${state.rows.length.toLocaleString("en")} of ${run().d_sae.toLocaleString("en")} latents` +
    (listed < state.rows.length ? `, ${listed.toLocaleString("en")} in detail` : "");
  keepInSight();
}

function keepInSight() {
  const list = byId("list");
  const y = state.active * ROW;
  if (y < list.scrollTop) list.scrollTop = y;
  else if (y + ROW > list.scrollTop + list.clientHeight) list.scrollTop = y + ROW - list.clientHeight;
  drawRows();
}

function showOverview() {
  const columns = [
    ["L0", "l0"],
    ["target", "l0_target"],
    ["FVU", "fvu"],
    ["delta LM loss", "delta_lm_loss"],
    ["loss recovered", "loss_recovered"],
    ["dead", "dead_fraction"],
    ["seed", "seed"],
  ];
  const head = html(
    "tr",
    {},
    html("th", { scope: "col" }, "run"),
    columns.map(([name]) => html("th", { scope: "col", class: "number" }, name)),
  );
  const rows = DATA.runs.map((of, i) =>
    html(
      "tr",
      {},
      html("td", {}, html("b", {}, `${runLetter(i)} `), dot(of.label), of.name),
      columns.map(([, key]) =>
        html(
          "td",
          { class: "number" },
          key === "dead_fraction" ? `${(100 * of.metrics[key]).toFixed(1)} %` : number(of.metrics[key], 4),
        ),
      ),
    ),
  );
  byId("overview").replaceChildren(
    html("h2", {}, DATA.runs.length > 1 ? "Runs" : "Run"),
    html("div", { class: "scroll" }, html("table", {}, head, rows)),
    ...DATA.runs.flatMap((of, i) => of.notes.map((note) => html("p", { class: "note" }, `${runLetter(i)}: ${note}`))),
    html("h3", {}, "Frontier: all runs of the sweep, this page's ringed"),
    html("div", { class: "panels" }, DATA.frontier.panels.map(frontierFigure)),
    html("h3", {}, "How often latents fire (number of latents, on a log scale, by share of tokens)"),
    html(
      "div",
      { class: "panels" },
      DATA.runs.map((of, i) =>
        html("figure", {}, html("figcaption", {}, runLetter(i), " ", of.label), frequencyPicture(of)),
      ),
    ),
    html("h3", {}, "How to read a latent"),
    html(
      "p",
      { class: "note" },
      `Everything is measured on ${run().n_tokens.toLocaleString("en")} tokens of documents that the SAE was not ` +
        "trained on. The colour of a token is how strongly the latent fires there, relative to its largest " +
        "activation; its number is " +
        "in its title, and beside it with the button Numbers. Contexts are chosen for the underlined token: " +
        "the strongest, some around " +
        "the median of a sample, and some of the weakest tenth; those that share text with one above are left out.",
    ),
    html(
      "p",
      { class: "note" },
      "Promoted and suppressed tokens are the direct effect of the latent's decoder direction on the logits: " +
        "through the scale of the final norm and the unembedding, less the mean over all tokens, for one " +
        "unit of the latent where the residual " +
        "stream has RMS 1. What the layers in between make of it is left out, so for a latent in an early " +
        "layer this may say little.",
    ),
  );
}

function effectList(kind, [ids, values]) {
  const largest = Math.max(...values.map(Math.abs), 1e-30);
  return html(
    "div",
    { class: kind },
    html("h3", {}, kind === "promoted" ? "Promoted tokens" : "Suppressed tokens"),
    html(
      "ol",
      {},
      ids.map((id, i) =>
        html(
          "li",
          { "--share": `${(100 * Math.abs(values[i])) / largest}%` },
          html("span", { class: "token", title: JSON.stringify(DATA.tokens[id]) }, visible(DATA.tokens[id], true)),
          html("span", { class: "number" }, values[i].toPrecision(2)),
        ),
      ),
    ),
  );
}

function contextRow([, about, ids, on, values], largest) {
  const value = new Map(on.map((at, i) => [at, values[i]]));
  const words = ids.map((id, i) => {
    const shown = visible(DATA.tokens[id]);
    const strength = value.get(i);
    if (strength === undefined) return document.createTextNode(shown);
    return html(
      "mark",
      {
        class: i === about ? "about" : null,
        title: `${JSON.stringify(DATA.tokens[id])}: ${number(strength)}`,
        "--share": `${15 + (85 * strength) / largest}%`,
      },
      shown,
      html("sub", {}, number(strength, 2)),
    );
  });
  return html(
    "div",
    { class: "context" },
    html("span", { class: "value number" }, number(value.get(about))),
    html("span", { class: "text" }, words),
  );
}

function latentArticle(index, latent, heading) {
  const of = DATA.runs[index];
  const details = of.details[latent];
  const facts = [
    ["fires on", percent(of.frequency[latent])],
    ["mean where it fires", number(of.mean[latent])],
    ["largest", number(of.max[latent])],
  ];
  const parts = [
    heading,
    html(
      "dl",
      { class: "facts" },
      facts.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", { class: "number" }, value))),
    ),
  ];
  if (!details) {
    parts.push(
      html(
        "p",
        { class: "note" },
        of.frequency[latent]
          ? "Listed only: python -m analysis.dashboard with a larger --latents shows it in detail."
          : "It fired on none of these tokens.",
      ),
    );
    return html("article", {}, parts);
  }
  parts.push(
    html("h3", {}, "Activations (number of tokens, on a log scale)"),
    html("div", { class: "histogram" }, activationPicture(details)),
  );
  for (const [i, [ids, cosines]] of Object.entries(details.nearest ?? {})) {
    parts.push(
      html("h3", {}, `Nearest in ${runLetter(Number(i))} ${DATA.runs[i].label}, by cosine of decoder rows`),
      html(
        "p",
        { class: "facts" },
        ids.map((id, j) =>
          html("a", { class: "number", href: `#latent/${i}/${id}` }, `#${id} (${cosines[j].toFixed(2)})`),
        ),
      ),
    );
  }
  if (details.effects) {
    parts.push(
      html(
        "div",
        { class: "effects" },
        effectList("promoted", details.effects[0]),
        effectList("suppressed", details.effects[1]),
      ),
    );
  }
  DATA.kinds.forEach((kind, k) => {
    const own = details.contexts.filter(([which]) => which === k);
    if (own.length)
      parts.push(
        html("h3", {}, `${kind[0].toUpperCase()}${kind.slice(1)} activations`),
        ...own.map((context) => contextRow(context, of.max[latent])),
      );
  });
  return html("article", {}, parts);
}

function title(index, latent, text) {
  return html(
    "h2",
    {},
    DATA.runs.length > 1 ? html("span", {}, `${runLetter(index)} `, dot(DATA.runs[index].label)) : null,
    `Latent ${latent}`,
    html("span", { class: "faint" }, text),
  );
}

function button(text, label, action) {
  const node = html("button", { type: "button", "aria-label": label }, text);
  node.addEventListener("click", action);
  return node;
}

// The latent that was chosen and, beside it, the nearest one of each other run.
function showLatent() {
  const numbers = button("Numbers", "show activations as numbers", toggleNumbers);
  numbers.id = "numbers";
  numbers.setAttribute("aria-pressed", String(byId("latent").classList.contains("numbers")));
  const heading = html(
    "div",
    { class: "title" },
    title(state.run, state.latent, ""),
    button("←", "latent before this in the list", () => move(-1)),
    button("→", "next latent of the list", () => move(1)),
    numbers,
  );
  const articles = [latentArticle(state.run, state.latent, heading)];
  for (const [i, [ids, cosines]] of Object.entries(run().details[state.latent]?.nearest ?? {})) {
    const beside = html(
      "div",
      { class: "title" },
      title(Number(i), ids[0], ` nearest, cosine ${cosines[0].toFixed(2)}`),
    );
    articles.push(latentArticle(Number(i), ids[0], beside));
  }
  byId("latent").replaceChildren(html("div", { class: "columns" }, articles));
  byId("latent").scrollTop = 0;
  byId("spoken").textContent = `Latent ${state.latent}, fires on ${percent(run().frequency[state.latent])}`;
}
