// What clicks, keys and addresses do. An address is #overview, #list or #latent/<run>/<latent>.
function go(address) {
  if (location.hash === address) followAddress();
  else location.hash = address;
}
const open = () => {
  if (state.rows.length) go(`#latent/${state.run}/${state.rows[state.active]}`);
};

function followAddress() {
  const [view, index, latent] = location.hash.slice(1).split("/");
  const [i, j] = [Number(index), Number(latent)];
  const isLatent =
    view === "latent" &&
    Number.isInteger(i) &&
    Number.isInteger(j) &&
    DATA.runs[i] !== undefined &&
    j >= 0 &&
    j < DATA.runs[i].d_sae;
  document.body.dataset.view = isLatent ? "latent" : view === "list" ? "list" : "overview";
  byId("to-overview").setAttribute("aria-current", document.body.dataset.view === "overview" ? "page" : "false");
  byId("to-list").setAttribute("aria-current", document.body.dataset.view === "list" ? "page" : "false");
  if (isLatent) {
    const otherRun = state.run !== i;
    [state.run, state.latent] = [i, j];
    byId("run").value = String(i);
    if (otherRun) showList();
    else if (state.rows.includes(j)) state.active = state.rows.indexOf(j);
    showLatent();
  } else state.latent = null;
  keepInSight();
}

function move(by) {
  if (!state.rows.length) return;
  state.active = Math.min(state.rows.length - 1, Math.max(0, state.active + by));
  keepInSight();
  if (document.body.dataset.view === "latent") open();
}

function toggleNumbers() {
  const on = byId("latent").classList.toggle("numbers");
  byId("numbers")?.setAttribute("aria-pressed", String(on));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event;
  const searching = target.id === "search";
  const typing = target.matches("input, select");
  const inList = target.id === "list" || searching;
  const page = Math.max(1, Math.floor(byId("list").clientHeight / ROW) - 1);
  const moves = {
    ArrowDown: 1,
    ArrowUp: -1,
    PageDown: page,
    PageUp: -page,
    ...(searching ? {} : { Home: -Infinity, End: Infinity }),
  };
  if (key === "/" && !typing) {
    if (document.body.dataset.view !== "list") go("#list");
    byId("search").focus();
    byId("search").select();
  } else if (key === "Escape") {
    if (typing) byId("list").focus();
    else go("#list");
  } else if (inList && key in moves) move(moves[key]);
  else if (inList && key === "Enter") open();
  else if (!typing && (key === "j" || key === "k")) move(key === "j" ? 1 : -1);
  else if (!typing && key === "n") toggleNumbers();
  else return;
  event.preventDefault();
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("overview").textContent = "This page needs a browser of 2023 or later.";
    return;
  }
  DATA = await readData();
  document.title = `Latents: ${DATA.runs.map((of) => of.name).join(", ")}`;
  byId("where").textContent = DATA.where;
  DATA.runs.forEach((of, i) => byId("run").append(html("option", { value: i }, `${runLetter(i)}  ${of.name}`)));
  byId("choose-run").hidden = DATA.runs.length < 2;
  byId("run").addEventListener("change", () => {
    state.run = Number(byId("run").value);
    state.latent = null;
    if (document.body.dataset.view === "latent") go("#list");
    showList();
  });
  byId("controls").addEventListener("input", () => {
    byId("list").scrollTop = 0;
    state.active = 0;
    showList();
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("list").addEventListener("scroll", drawRows);
  byId("list").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row) return;
    state.active = Number(row.dataset.place);
    open();
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", followAddress);
  window.addEventListener("resize", keepInSight);
  showOverview();
  showList();
  followAddress();
  document.body.dataset.ready = "true";
}

start();
